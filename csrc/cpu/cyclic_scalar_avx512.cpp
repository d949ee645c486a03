// Scalar cyclic codes on AVX-512: all levels in registers.
//
//   8 bits    64 codes at a time: the 256 levels are bytes in four registers, vpermi2b looks up
//             either half of the table and the top bit of the code chooses
//   16 bits   16 codes at a time: the cosine from a quarter of a turn in four registers
#include "cyclic_scalar_fast.h"

#if RS_FAST_X86
#include "avx512.h"
#include "lanes_avx512.h"

namespace rs {
namespace {

// All levels, to be looked up 64 at a time.
struct Levels {
  __m512i at[4];

  RS_INLINE Levels() {
    for (int i = 0; i < 4; ++i) at[i] = load(kCyclicScalar[0][0] + 64 * i);
  }
  RS_INLINE __m512i operator()(__m512i codes) const {
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes),
                                  _mm512_permutex2var_epi8(at[0], codes, at[1]),
                                  _mm512_permutex2var_epi8(at[2], codes, at[3]));
  }
};

template <class T>
void decode8(const Layer& layer, int64_t row0, int64_t row1, T* w) {
  const Levels levels;
  const int64_t n = layer.tile_cols(), group = layer.tile.cols;
  const uint8_t* codes = layer.codes + row0 * n * group;
  for (int64_t t = row0 * n; t < row1 * n; ++t) {
    const __m512 step = _mm512_set1_ps(quiet(CyclicScalar<8>::step(layer.params[0][t])));
    for (int64_t j = 0; j < group; j += 64, codes += 64, w += 64) {
      const __m512i level = levels(load(codes));
      const __m128i part[4] = {_mm512_castsi512_si128(level), _mm512_extracti32x4_epi32(level, 1),
                               _mm512_extracti32x4_epi32(level, 2),
                               _mm512_extracti32x4_epi32(level, 3)};
      for (int i = 0; i < 4; ++i)
        store_some(w + 16 * i,
                   _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(part[i])), step), 0xFFFF);
    }
  }
}

template <class T>
void decode16(const Layer& layer, int64_t row0, int64_t row1, T* w) {
  const float* cosine = cyclic_cosines();
  const __m512 t0 = _mm512_loadu_ps(cosine), t1 = _mm512_loadu_ps(cosine + 16),
               t2 = _mm512_loadu_ps(cosine + 32), t3 = _mm512_loadu_ps(cosine + 48);
  const __m512i turn = _mm512_set1_epi32(256), half = _mm512_set1_epi32(128),
                quarter = _mm512_set1_epi32(64), one = _mm512_set1_epi32(1);
  const __m512 unit = _mm512_set1_ps(1.0f / 64);
  const int64_t n = layer.tile_cols(), group = layer.tile.cols;
  const uint8_t* codes = layer.codes + row0 * n * 2 * group;
  for (int64_t t = row0 * n; t < row1 * n; ++t) {
    const __m512 scale = _mm512_set1_ps(quiet(layer.params[0][t]));
    for (int64_t j = 0; j < group; j += 16, codes += 32, w += 16) {
      const __m512i c =
          _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
      // (16 phase + micro + 64 diff) mod 256, folded to the first half and then to a quarter turn.
      const __m512i diff = _mm512_and_si512(_mm512_srli_epi32(c, 2), _mm512_set1_epi32(0xC0));
      __m512i k = _mm512_and_si512(_mm512_add_epi32(c, diff), _mm512_set1_epi32(255));
      k = _mm512_min_epu32(k, _mm512_sub_epi32(turn, k));
      const __mmask16 negative = _mm512_cmpgt_epi32_mask(k, quarter);
      k = _mm512_min_epu32(k, _mm512_sub_epi32(half, k));
      __m512 value = _mm512_mask_blend_ps(_mm512_test_epi32_mask(k, _mm512_set1_epi32(32)),
                                          _mm512_permutex2var_ps(t0, k, t1),
                                          _mm512_permutex2var_ps(t2, k, t3));
      value = _mm512_maskz_mov_ps(_mm512_cmplt_epi32_mask(k, quarter), value);
      value = _mm512_mask_xor_ps(value, negative, value, _mm512_set1_ps(-0.0f));
      const __m512 amp = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_srli_epi32(c, 10), one));
      store_some(w, _mm512_mul_ps(_mm512_mul_ps(value, _mm512_mul_ps(amp, unit)), scale), 0xFFFF);
    }
  }
}

// For cyclic_scalar_steps.h.
using Ints = __m512i;
RS_INLINE Ints load_ints(const void* p) { return load(p); }
RS_INLINE Ints add_pairs(Ints sum, Ints a, Ints b) { return _mm512_dpwssd_epi32(sum, a, b); }
RS_INLINE Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
RS_INLINE Ints add_saturated(Ints a, Ints b) { return _mm512_adds_epi16(a, b); }
RS_INLINE Ints round_product(Ints a, Ints b) { return _mm512_mulhrs_epi16(a, b); }
RS_INLINE Ints magnitude(Ints x) { return _mm512_abs_epi16(x); }
constexpr int kAhead = 8192;
// 16-bit codes are too many: they would come too late.
template <int Bits, int B>
constexpr bool kStrips = B == kMaxBatch && Bits == 8;

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

void cyclic_scalar_avx512_slots(Row& row, int bits, int64_t group) {
  if (bits == 8 && group % 64 == 0) {
    row.decode = decode8<float>;
    row.decode_bf16 = decode8<uint16_t>;
  }
  if (bits == 16 && group % 16 == 0) {
    row.decode = decode16<float>;
    row.decode_bf16 = decode16<uint16_t>;
  }
  if (group % 64 == 0)
    bits == 8 ? fill_step_linear<8>(row, linear<8>) : fill_step_linear<16>(row, linear<16>);
}

}  // namespace rs
#endif
