// Uniform codes times two or more rows of x on AVX-512 (BW, VBMI, VNNI), groups of a multiple of
// 32: activations, unpacking and threads of uniform_narrow_avx512.cpp (up to 8 rows of x) and
// uniform_wide_avx512.cpp.
#include "fast.h"

#if RS_FAST_X86
#include <vector>

#include "parallel.h"
#include "uniform_integers.h"
#include "uniform_limbs.h"

#include "avx512.h"

namespace rs {
namespace {

// 64 codes of any width to bytes by vpermb and vpmultishiftqb.
template <int Bits>
void unpack(const uint8_t* codes, int64_t count, int64_t ahead, uint8_t* to) {
  const __m512i top = _mm512_set1_epi8(static_cast<char>((1 << Bits) - 1));
  const auto spread = [&](__m512i c) __attribute__((always_inline)) {
    if constexpr (Bits == 8) return c;
    c = _mm512_permutexvar_epi8(load(kSpread<Bits>.bytes.at), c);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(load(kSpread<Bits>.cut.at), c), top);
  };
  for (int64_t line = 0; line < count * Bits / 8; line += 64)
    _mm_prefetch(codes + ahead + line, _MM_HINT_T1);
  for (; count >= 64; count -= 64, codes += 8 * Bits, to += 64) {
    if constexpr (Bits == 4) {
      _mm512_store_si512(to, spread(_mm512_castsi256_si512(
                                 _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)))));
    } else {
      constexpr __mmask64 kWhole = Bits == 8 ? ~0ull : (1ull << (8 * Bits % 64)) - 1;
      _mm512_store_si512(to, spread(_mm512_maskz_loadu_epi8(kWhole, codes)));
    }
  }
  if (count) _mm512_store_si512(to, spread(_mm512_maskz_loadu_epi8((1ull << 4 * Bits) - 1, codes)));
}
constexpr UnpackBytes kUnpack[] = {unpack<2>, unpack<3>, unpack<4>, unpack<5>,
                                   unpack<6>, unpack<7>, unpack<8>};

// The columns of two steps of 2, 4 and 8 rows of x: even ones before odd ones.
struct EvenFirst : Bytes {
  constexpr EvenFirst(int run) : Bytes{} {
    for (int i = 0; i < 64; ++i)
      at[i] = static_cast<uint8_t>(i / run * run + i % (run / 2) * 2 + i % run / (run / 2));
  }
};
constexpr EvenFirst kEvenFirst[] = {64, 32, 16};

// Rows [first, end) of x into their lanes, by way of bytes[limbs * in].
void quantize(const float* x, int64_t in, int64_t first, int64_t end, int8_t* bytes,
              const LimbActivations& to) {
  const int64_t step_bytes = to.vectors * 64, lanes = to.vectors * 16;
  for (int64_t b = first; b < end; ++b) {
    const int64_t lane = b * to.span;
    Quantum quantum(x + b * in, to.limbs == 2 ? in : 0, kLimbTop);
    if (to.limbs == 2) to.unit[b] = quantum.unit;
    double sum = 0;
    for (int64_t c = 0; c < in; c += to.piece) {
      const int64_t piece = c / to.piece;
      if (to.limbs == 1) {
        quantum = Quantum(x + b * in + c, to.piece, kByteTop);
        for (int64_t i = 0; i < to.span; ++i) to.unit[piece * lanes + lane + i] = quantum.unit;
      }
      const __m512 inverse = _mm512_set1_ps(quantum.inverse);
      __m512i total = _mm512_setzero_si512();
      for (int64_t i = c; i < c + to.piece; i += 16) {
        const __m512i q =
            _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + b * in + i), inverse));
        const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
        total = _mm512_add_epi32(total, q);
        int8_t* at = bytes + i;
        if (to.limbs == 2) {
          _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_cvtepi32_epi8(high));
          at += in;
        }
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_cvtepi32_epi8(q));
      }
      // Lanes where x is not finite hold INT_MIN, whose sums need 64 bits.
      const __m512i halves =
          _mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(total)),
                           _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(total, 1)));
      sum += static_cast<double>(_mm512_reduce_add_epi64(halves)) *
             (to.limbs == 1 ? static_cast<double>(quantum.unit) : 1.0);
      if ((c + to.piece) % to.summed == 0) {
        const int64_t s = c / to.summed;
        to.sums[s / to.span * lanes + lane + s % to.span] = static_cast<float>(sum);
        sum = 0;
      }
    }
    if (to.nibbles) {
      const __m512i order = load(kEvenFirst[std::bit_width(static_cast<uint64_t>(to.rows)) - 2].at);
      for (int64_t i = 0; i < to.limbs * in; i += 64)
        _mm512_storeu_si512(bytes + i, _mm512_permutexvar_epi8(order, load(bytes + i)));
    }
    for (int64_t piece = 0; piece < in / to.piece; ++piece)
      for (int64_t limb = 0; limb < to.limbs; ++limb) {
        const int8_t* from = bytes + limb * in + piece * to.piece;
        int8_t* row =
            to.values.get() + (piece * to.limbs + limb) * to.steps * step_bytes + lane * 4;
        for (int64_t step = 0; step < to.steps; ++step, row += step_bytes)
          for (int64_t i = 0; i < to.span; ++i, from += 4) __builtin_memcpy(row + i * 4, from, 4);
      }
  }
}

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {
namespace {

constexpr int64_t kMostRows = 512;  // of x at once: 4 MB of integers for 4096 columns

void narrow_linear(const LimbProduct& p, int limbs, const float* x) {
  const int64_t in = p.layer.in, group = p.layer.tile.cols;
  LimbActivations values(limbs, p.m, in, byte_piece(group), group);
  values.nibbles = p.bits == 4 && values.piece * values.rows >= 128;
  quantize(x, in, 0, p.m, Lines<int8_t>(round_up(limbs * in, 64)).get(), values);
  parallel_for(p.layer.out, round_up(row_grain(p.layer.out, in), 8),
               [&](int64_t begin, int64_t end) { uniform_narrow_avx512(p, values, begin, end); });
}

void wide_linear(const LimbProduct& p, int limbs, const float* x) {
  const int64_t in = p.layer.in, group = p.layer.tile.cols;
  const int64_t piece = limbs == 1 ? byte_piece(group) : wide_piece(group);
  std::vector<LimbActivations> chunks;
  for (int64_t b = 0; b < p.m; b += kWideRows)
    chunks.emplace_back(limbs,
                        std::max<int64_t>(std::min<int64_t>(kWideRows, p.m - b), kNarrowRows + 1),
                        in, piece, piece);
  // Sixteen rows fill whole lines.
  parallel_for(p.m, 16, [&](int64_t begin, int64_t end) {
    const Lines<int8_t> bytes(limbs * in);
    for (int64_t b = begin; b < end; b += 16) {
      const int64_t first = b / kWideRows * kWideRows;
      quantize(x + first * in, in, b - first, std::min(b + 16, end) - first, bytes.get(),
               chunks[static_cast<size_t>(b / kWideRows)]);
    }
  });
  parallel_for(p.layer.out, 24, [&](int64_t begin, int64_t end) {
    uniform_wide_avx512(p, chunks.data(), begin, end);
  });
}

}  // namespace

void uniform_limbs_avx512(const Layer& layer, int bits, int limbs, const float* x, int64_t m,
                          float* y) {
  const bool symmetric = layer.params.size() == 1;
  const float middle = static_cast<float>(1 << (bits - 1));
  LimbProduct p{
      layer, kUnpack[bits - 2], symmetric ? &middle : layer.params[1], symmetric ? 0 : 1, bits, m,
      y};
  for (int64_t b = 0; b < m; b += kMostRows) {
    p.m = std::min(kMostRows, m - b);
    p.y = y + b * layer.out;
    (p.m > kNarrowRows ? wide_linear : narrow_linear)(p, limbs, x + b * layer.in);
  }
}

}  // namespace rs
#endif
