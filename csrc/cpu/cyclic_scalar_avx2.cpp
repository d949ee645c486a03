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

struct Levels {
  RS_INLINE __m256i operator()(__m256i codes) const {
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
};

void decode8(const Layer& layer, int64_t row0, int64_t row1, float* w) {
  const int64_t n = layer.tile_cols(), group = layer.tile.cols;
  const uint8_t* codes = layer.codes + row0 * n * group;
  for (int64_t t = row0 * n; t < row1 * n; ++t) {
    const __m256 step = _mm256_set1_ps(CyclicScalar<8>::step(layer.params[0][t]));
    for (int64_t j = 0; j < group; j += 32, codes += 32, w += 32) {
      alignas(32) int8_t levels[32];
      _mm256_store_si256(reinterpret_cast<__m256i*>(levels),
                         Levels()(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes))));
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

// For cyclic_scalar_steps.h.
using Ints = __m256i;
RS_INLINE Ints load_ints(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
RS_INLINE Ints add_pairs(Ints sum, Ints a, Ints b) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}
RS_INLINE Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
RS_INLINE Ints add_saturated(Ints a, Ints b) { return _mm256_adds_epi16(a, b); }
RS_INLINE Ints round_product(Ints a, Ints b) { return _mm256_mulhrs_epi16(a, b); }
RS_INLINE Ints magnitude(Ints x) { return _mm256_abs_epi16(x); }
constexpr int kAhead = 2048;
template <int Bits, int B>
constexpr bool kStrips = false;  // they gained nothing

}  // namespace
}  // namespace rs

#include "cyclic_scalar_steps.h"

#pragma GCC pop_options

namespace rs {
namespace {

template <int Bits>
void linear(const Layer& layer, const float* x, int64_t m, float* y) {
  step_linear(layer, x, m, y, kStepColumns, Bits == 8, kStepKernels<Bits>);
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
