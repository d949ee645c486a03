// Uniform codes on AVX-512 (BW, VBMI, VNNI), groups of a multiple of 32.
//
// linear   of one row of x: codes of 2, 4 and 8 bits are shifted and masked to int16, of other
//          widths spread to bytes first (vpermb brings the bytes of eight codes into 64 bits,
//          vpmultishiftqb cuts them); vpdpwssd with int16 activations adds neighbouring columns in
//          32-bit lanes, flushed to float with each lane's scale. Zero points cost one product per
//          group, with the sums of x. More rows: uniform_limbs_avx512.cpp.
// decode   two bytes per code by vpermb into 32-bit lanes, shifted by lane.
#include "fast.h"

#if RS_FAST_X86
#include "parallel.h"
#include "uniform_integers.h"
#include "uniform_limbs.h"
#include "uniform_unpack.h"

#include "avx512.h"

#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 warns inside its own intrinsics

namespace rs {
namespace {

template <int Bits>
constexpr int kParts = 16 / uniform_view(Bits);
template <int Bits>
constexpr int kBlockBytes = uniform_block(Bits) * Bits / 8;
template <int Bits>
constexpr __mmask64 kBlockMask =
    kBlockBytes<Bits> == 64 ? ~0ull : (1ull << (kBlockBytes<Bits> % 64)) - 1;

// Code k of every int16 word of the block at p; of a block that is not whole, only `mask` bytes
// exist.
template <int Bits, bool Whole>
RS_INLINE void words_of(const uint8_t* p, __mmask64 mask, __m512i* w) {
  __m512i codes;
  if constexpr (Whole && kBlockBytes<Bits> == 64) {
    codes = load(p);
  } else {
    codes = _mm512_maskz_loadu_epi8(Whole ? kBlockMask<Bits> : mask, p);
  }
  if constexpr (Bits != uniform_view(Bits))
    codes = _mm512_multishift_epi64_epi8(
        load(kSpread<Bits>.cut.at), _mm512_permutexvar_epi8(load(kSpread<Bits>.bytes.at), codes));
  const __m512i top = _mm512_set1_epi16((1 << Bits) - 1);
  constexpr int kView = uniform_view(Bits);
  for (int k = 0; k < kParts<Bits>; ++k) {
    w[k] = _mm512_srli_epi16(codes, k * kView);
    if (Bits != kView || k + 1 < kParts<Bits>) w[k] = _mm512_and_si512(w[k], top);
  }
}

struct Product {
  const Layer& layer;
  const UniformGroups& groups;
  const UniformActivations& x;
  bool symmetric;
  float* repeated;  // a row of scales, when each stands for more than one group
  float* y;
};

// The scale of every lane of a block with PerBlock of them. A masked load of all would be shorter,
// and slow where it crosses a cache line.
template <int PerBlock>
RS_INLINE __m512 lane_scales(const float* s, __m512i lane) {
  if constexpr (PerBlock == 2) {
    double two;
    __builtin_memcpy(&two, s, sizeof two);
    return _mm512_permutexvar_ps(lane, _mm512_castpd_ps(_mm512_set1_pd(two)));
  }
  if constexpr (PerBlock == 4)
    return _mm512_permutexvar_ps(lane, _mm512_broadcast_f32x4(_mm_loadu_ps(s)));
  if constexpr (PerBlock == 8)
    return _mm512_permutexvar_ps(lane, _mm512_broadcast_f32x8(_mm256_loadu_ps(s)));
  return _mm512_set1_ps(*s);
}

// acc plus the integer products of a block, `mask` of its bytes.
template <int Bits, bool Whole>
RS_INLINE __m512i add_block(const uint8_t* codes, __mmask64 mask, const int16_t* values,
                            __m512i acc) {
  __m512i w[kParts<Bits>];
  words_of<Bits, Whole>(codes, mask, w);
  for (int k = 0; k < kParts<Bits>; ++k)
    acc = _mm512_dpwssd_epi32(acc, w[k], load(values + k * 32));
  return acc;
}

RS_INLINE __m512 flush(__m512i acc, __m512 scales, __m512 total) {
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), scales, total);
}

// PerBlock scales meet a block, or, when it is 0, one scale meets groups.span blocks.
template <int Bits, int PerBlock>
void one_row(const Product& p, int64_t row) {
  constexpr int kStep = kParts<Bits> * 32;
  // Bytes of software prefetch. Lines come to the second-level cache first: misses of the first are
  // too few at a time to keep memory busy.
  constexpr int kAhead = 2048, kFarAhead = 8192;
  constexpr int kRowsAhead =
      8;  // of scales and zeros, which are too short for the hardware to foresee
  const auto& [layer, groups, x, symmetric, repeated, y] = p;
  const int64_t n = layer.tile_cols(), row_bytes = n * layer.tile.bytes;
  const int64_t full = layer.in / uniform_block(Bits), scales = n * groups.repeat;
  const uint8_t* codes = layer.codes + row * row_bytes;
  const float* scale = layer.params[0] + row * n;
  const float* zero = symmetric ? nullptr : layer.params[1] + row * n;
  const float* s = scale;
  if (groups.repeat > 1) {
    float* to = repeated;
    for (int64_t g = 0; g < n; ++g)
      for (int64_t i = 0; i < groups.repeat; ++i) *to++ = scale[g];
    s = repeated;
  }
  const __m512i lane = load(groups.lane);
  const int16_t* values = x.values.get();
  const int64_t span = PerBlock ? 1 : groups.span;
  __m512 total = _mm512_setzero_ps();
  for (int64_t block = 0; block < full; block += span, s += PerBlock ? PerBlock : 1) {
    __m512i acc = _mm512_setzero_si512();
    for (int64_t i = 0; i < span; ++i, codes += kBlockBytes<Bits>, values += kStep) {
      _mm_prefetch(codes + kAhead, _MM_HINT_T0);
      _mm_prefetch(codes + kFarAhead, _MM_HINT_T1);
      acc = add_block<Bits, true>(codes, 0, values, acc);
    }
    total = flush(acc, lane_scales<PerBlock>(s, lane), total);
  }
  if (x.blocks > full) {
    const __mmask64 mask = (1ull << (row_bytes - full * kBlockBytes<Bits>)) - 1;
    const __mmask16 rest = static_cast<__mmask16>((1 << (scales % groups.per_block)) - 1);
    total = flush(add_block<Bits, false>(codes, mask, values, _mm512_setzero_si512()),
                  _mm512_permutexvar_ps(lane, _mm512_maskz_loadu_ps(rest, s)), total);
  }
  for (int64_t g = 0; g < n; g += 16) {
    _mm_prefetch(scale + g + kRowsAhead * n, _MM_HINT_T0);
    if (zero) _mm_prefetch(zero + g + kRowsAhead * n, _MM_HINT_T0);
    const __mmask16 mask = static_cast<__mmask16>(n - g >= 16 ? 0xFFFF : (1 << (n - g)) - 1);
    const __m512 z = zero ? _mm512_maskz_loadu_ps(mask, zero + g) : _mm512_set1_ps(1 << (Bits - 1));
    const __m512 offset = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, scale + g), z);
    total = _mm512_fnmadd_ps(offset, _mm512_load_ps(x.sums.get() + g), total);
  }
  y[row] = _mm512_reduce_add_ps(total) * x.unit[0];
}

template <int Bits>
void product(const Product& p, int64_t row0, int64_t row1) {
  constexpr int kMost = 16 / uniform_view(Bits);  // scales a block can have, of groups of 32
  const auto run = p.groups.span > 1         ? one_row<Bits, 0>
                   : p.groups.per_block == 1 ? one_row<Bits, 1>
                   : p.groups.per_block == 2 ? one_row<Bits, 2>
                   : p.groups.per_block == 4 ? one_row<Bits, std::min(kMost, 4)>
                                             : one_row<Bits, kMost>;
  for (; row0 < row1; ++row0) run(p, row0);
}

// Words 1, 3, 5, ... of two registers.
struct UpperWords {
  alignas(64) uint16_t at[32]{};
  constexpr UpperWords() {
    for (int i = 0; i < 32; ++i) at[i] = static_cast<uint16_t>(2 * i + 1);
  }
};
constexpr UpperWords kUpperWords;

RS_INLINE void store(float* w, __m512 a, __m512 b) {
  _mm512_storeu_ps(w, a);
  _mm512_storeu_ps(w + 16, b);
}
RS_INLINE void store(uint16_t* w, __m512 a, __m512 b) {
  _mm512_storeu_si512(
      w, _mm512_permutex2var_epi16(round_bf16(a), load(kUpperWords.at), round_bf16(b)));
}

template <int Bits, class T>
void decode_rows(const Layer& layer, bool symmetric, int64_t row0, int64_t row1, T* w) {
  constexpr int kBytes = 4 * Bits;  // of 32 codes
  const auto& [bytes, shift] = kUnpack<Bits>;
  const __m512i top = _mm512_set1_epi32((1 << Bits) - 1);
  const int64_t n = layer.tile_cols();
  const uint8_t* codes = layer.codes + row0 * n * layer.tile.bytes;
  for (int64_t tile = row0 * n; tile < row1 * n; ++tile) {
    const __m512 scale = _mm512_set1_ps(quiet(layer.params[0][tile]));
    const __m512 zero = _mm512_set1_ps(symmetric ? 1 << (Bits - 1) : quiet(layer.params[1][tile]));
    for (int64_t j = 0; j < layer.tile.cols; j += 32, codes += kBytes, w += 32) {
      __m512i c;
      if constexpr (Bits == 8) {
        c = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
      } else if constexpr (Bits == 4) {
        c = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
      } else {
        c = _mm512_castsi256_si512(_mm256_maskz_loadu_epi8((1ull << kBytes) - 1, codes));
      }
      __m512 level[2];
      for (int i = 0; i < 2; ++i) {
        const __m512i pair = _mm512_permutexvar_epi8(load(bytes[i].at), c);
        const __m512i code = _mm512_and_si512(_mm512_srlv_epi32(pair, load(shift.at)), top);
        level[i] = _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(code), zero), scale);
      }
      store(w, level[0], level[1]);
    }
  }
}

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {
namespace {

template <int Bits, bool Symmetric>
void linear(const Layer& layer, const float* x, int64_t m, float* y) {
  if (m > 1) return uniform_limbs_avx512(layer, Bits, 2, x, m, y);
  constexpr int kView = uniform_view(Bits);
  const UniformGroups groups(layer.tile.cols, kView);
  const UniformActivations values(x, 1, layer.in, kView, layer.tile.cols);
  parallel_for(layer.out, row_grain(layer.out, layer.in), [&](int64_t begin, int64_t end) {
    const Lines<float> repeated(groups.repeat > 1 ? layer.in / groups.group : 0);
    product<Bits>({layer, groups, values, Symmetric, repeated.get(), y}, begin, end);
  });
}

// One row of x is bound by memory: single bytes were no faster there.
template <int Bits, bool Symmetric>
void linear_int8(const Layer& layer, const float* x, int64_t m, float* y) {
  if (m == 1) return linear<Bits, Symmetric>(layer, x, m, y);
  uniform_limbs_avx512(layer, Bits, 1, x, m, y);
}

template <int Bits, bool Symmetric, class T>
void decode(const Layer& layer, int64_t row0, int64_t row1, T* w) {
  decode_rows<Bits>(layer, Symmetric, row0, row1, w);
}

}  // namespace

void uniform_avx512_slots(Row& row, int bits, bool symmetric, int64_t group) {
  if (group % 32 != 0) return;
  with_uniform(bits, symmetric, [&]<int Bits, bool Symmetric> {
    row.decode = decode<Bits, Symmetric, float>;
    row.decode_bf16 = decode<Bits, Symmetric, uint16_t>;
    row.linear = linear<Bits, Symmetric>;
    row.linear_int8 = linear_int8<Bits, Symmetric>;
    row.linear_max_m = std::numeric_limits<int64_t>::max();
    row.linear_type = "integer codes, 16-bit activations per row";
  });
}

}  // namespace rs
#endif
