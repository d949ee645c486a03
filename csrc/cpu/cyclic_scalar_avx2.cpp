// Scalar cyclic codes on AVX2.
//
//   8 bits    32 codes at a time: of the 16 rows of levels eight are distinct (row d of the cosine
//             is row 0 from 4 d on); vpshufb looks every phase up in all eight and a tree of
//             blends, by three bits that depend on family and diff, chooses
//   16 bits   decode: eight codes at a time, the cosines gathered from a kilobyte in the first
//             cache; linear: 16 at a time, the cosine as an odd polynomial in int16
#include "cyclic_scalar_fast.h"

#if RS_FAST_X86
#include "lanes_avx2.h"

namespace rs {
namespace {

// By family and diff: the distinct row, a bit of it in the top of each byte; what is added to the
// phase.
struct Choice {
  alignas(16) uint8_t bit[3][16]{}, turn[16]{};
  constexpr Choice() {
    constexpr int row[16] = {0, 0, 0, 0, 1, 2, 1, 2, 3, 3, 3, 3, 4, 5, 6, 7};
    for (int i = 0; i < 16; ++i) {
      for (int b = 0; b < 3; ++b) bit[b][i] = static_cast<uint8_t>((row[i] >> b & 1) << 7);
      turn[i] = static_cast<uint8_t>(i < 4 ? 4 * i : 0);
    }
  }
};
constexpr Choice kChoice;

RS_INLINE __m256i table(const void* row) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(row)));
}

// Levels of 32 codes.
RS_INLINE __m256i levels_of(__m256i codes) {
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i kind = _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble);
  const __m256i turn = _mm256_shuffle_epi8(table(kChoice.turn), kind);
  const __m256i phase = _mm256_and_si256(_mm256_add_epi8(codes, turn), nibble);
  const auto& levels = kCyclicScalar;
  __m256i found[8] = {table(levels[0][0]), table(levels[1][0]), table(levels[1][1]),
                      table(levels[2][0]), table(levels[3][0]), table(levels[3][1]),
                      table(levels[3][2]), table(levels[3][3])};
  for (__m256i& row : found) row = _mm256_shuffle_epi8(row, phase);
  for (int b = 0, rows = 4; b < 3; ++b, rows /= 2) {
    const __m256i bit = _mm256_shuffle_epi8(table(kChoice.bit[b]), kind);
    for (int i = 0; i < rows; ++i)
      found[i] = _mm256_blendv_epi8(found[2 * i], found[2 * i + 1], bit);
  }
  return found[0];
}

void decode8(const Layer& layer, int64_t row0, int64_t row1, float* w) {
  const int64_t n = layer.tile_cols(), group = layer.tile.cols;
  const uint8_t* codes = layer.codes + row0 * n * group;
  for (int64_t t = row0 * n; t < row1 * n; ++t) {
    const __m256 step = _mm256_set1_ps(CyclicScalar<8>::step(layer.params[0][t]));
    for (int64_t j = 0; j < group; j += 32, codes += 32, w += 32) {
      alignas(32) int8_t levels[32];
      _mm256_store_si256(reinterpret_cast<__m256i*>(levels),
                         levels_of(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes))));
      for (int i = 0; i < 32; i += 8) {
        const __m256i level =
            _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(levels + i)));
        _mm256_storeu_ps(w + i, _mm256_mul_ps(_mm256_cvtepi32_ps(level), step));
      }
    }
  }
}

void decode16(const Layer& layer, int64_t row0, int64_t row1, float* w) {
  const float* cosine = cyclic_cosines();
  const __m256 unit = _mm256_set1_ps(1.0f / 64);
  const int64_t n = layer.tile_cols(), group = layer.tile.cols;
  const uint8_t* codes = layer.codes + row0 * n * 2 * group;
  for (int64_t t = row0 * n; t < row1 * n; ++t) {
    const __m256 scale = _mm256_set1_ps(layer.params[0][t]);
    for (int64_t j = 0; j < group; j += 8, codes += 16, w += 8) {
      const __m256i c =
          _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
      const __m256i diff = _mm256_and_si256(_mm256_srli_epi32(c, 2), _mm256_set1_epi32(0xC0));
      const __m256i k = _mm256_and_si256(_mm256_add_epi32(c, diff), _mm256_set1_epi32(255));
      const __m256 amp =
          _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_srli_epi32(c, 10), _mm256_set1_epi32(1)));
      const __m256 level =
          _mm256_mul_ps(_mm256_i32gather_ps(cosine, k, 4), _mm256_mul_ps(amp, unit));
      _mm256_storeu_ps(w, _mm256_mul_ps(level, scale));
    }
  }
}

// Weights of a step as two registers of int16, in the order of the activations; kUnit is what they
// are times the group's step, and kFlush how many steps' products may be added in 32 bits.
template <int Bits>
struct Step;

template <>
struct Step<8> {
  static constexpr float kUnit = 1.0f;
  static constexpr int64_t kFlush = 64;
  RS_INLINE static void weights(const uint8_t* codes, __m256i* w) {
    const __m256i levels = levels_of(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    w[0] = _mm256_srai_epi16(_mm256_slli_epi16(levels, 8), 8);
    w[1] = _mm256_srai_epi16(levels, 8);
  }
};

template <>
struct Step<16> {
  static constexpr float kUnit = 1.0f / 8192;
  static constexpr int64_t kFlush = 2;
  RS_INLINE static __m256i word(int x) { return _mm256_set1_epi16(static_cast<int16_t>(x)); }

  // cos(2 pi k / 256) = sin(pi u / 2), u = 1 - |k| / 64 for k from -128 to 127, as u times a
  // polynomial in u^2, 1.7e-4 off at most and never above one: products of two steps just fit 32
  // bits. Fractions of 14 bits but where one of 15 says so.
  RS_INLINE static __m256i weight(__m256i c) {
    const __m256i shifted = _mm256_srli_epi16(c, 2);
    const __m256i k = _mm256_add_epi16(c, _mm256_and_si256(shifted, word(0xC0)));
    const __m256i u = _mm256_sub_epi16(word(1 << 14), _mm256_abs_epi16(_mm256_slli_epi16(k, 8)));
    const __m256i u15 = _mm256_adds_epi16(u, u), square = _mm256_mulhrs_epi16(u, u15);
    const __m256i square15 = _mm256_adds_epi16(square, square);
    const __m256i high = _mm256_sub_epi16(_mm256_mulhrs_epi16(square, word(2360)), word(10525));
    const __m256i sum = _mm256_add_epi16(_mm256_mulhrs_epi16(high, square15), word(25730));
    const __m256i amp = _mm256_add_epi16(_mm256_and_si256(shifted, word(0x3F00)), word(0x100));
    return _mm256_mulhrs_epi16(_mm256_mulhrs_epi16(u15, sum), amp);
  }
  RS_INLINE static void weights(const uint8_t* codes, __m256i* w) {
    for (int i = 0; i < 2; ++i)
      w[i] = weight(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 32 * i)));
  }
};

template <int Bits, int B>
void product(const Layer& layer, const StepActivations& x, int64_t m, float* y, int64_t row0,
             int64_t row1) {
  constexpr int kBytes = 4 * Bits, kAhead = 2048;  // bytes of a step and of software prefetch
  const int64_t n = layer.tile_cols(), steps = layer.tile.cols / 32;
  for (int64_t row = row0; row < row1; ++row) {
    const uint8_t* codes = layer.codes + row * n * layer.tile.bytes;
    const int16_t* values = x.values.get();
    __m256 total[B];
    for (__m256& sum : total) sum = _mm256_setzero_ps();
    for (int64_t t = row * n; t < (row + 1) * n; ++t) {
      const __m256 scale =
          _mm256_set1_ps(CyclicScalar<Bits>::step(layer.params[0][t]) * Step<Bits>::kUnit);
      for (int64_t done = 0; done < steps; done += Step<Bits>::kFlush) {
        __m256i acc[B];
        for (__m256i& sum : acc) sum = _mm256_setzero_si256();
        for (int64_t i = std::min(steps - done, Step<Bits>::kFlush); i > 0; --i) {
          _mm_prefetch(codes + kAhead, _MM_HINT_T0);
          if (Bits == 16) _mm_prefetch(codes + kAhead + 64, _MM_HINT_T0);
          __m256i w[2];
          Step<Bits>::weights(codes, w);
          for (int b = 0; b < B; ++b)
            for (int h = 0; h < 2; ++h) {
              const auto* v = reinterpret_cast<const __m256i*>(values + b * 32 + h * 16);
              acc[b] = _mm256_add_epi32(acc[b], _mm256_madd_epi16(w[h], _mm256_load_si256(v)));
            }
          codes += kBytes;
          values += 32 * B;
        }
        for (int b = 0; b < B; ++b)
          total[b] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[b]), scale, total[b]);
      }
    }
    for (int b = 0; b < B; ++b)
      if (b < m) y[b * layer.out + row] = sum_lanes(total[b]) * x.unit[b];
  }
}

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {
namespace {

template <int Bits>
void linear(const Layer& layer, const float* x, int64_t m, float* y) {
  constexpr StepKernel kernels[4] = {product<Bits, 1>, product<Bits, 2>, product<Bits, 4>,
                                     product<Bits, 8>};
  step_linear(layer, x, m, y, 32, Bits == 8, kernels);
}

}  // namespace

void cyclic_scalar_avx2_slots(Row& row, int bits, int64_t group) {
  if (bits == 8 && group % 32 == 0) row.decode = decode8;
  if (bits == 16 && group % 8 == 0) row.decode = decode16;
  if (group % 32 == 0)
    bits == 8 ? fill_step_linear<8>(row, linear<8>) : fill_step_linear<16>(row, linear<16>);
}

}  // namespace rs
#endif
