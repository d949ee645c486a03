// Scalar cyclic codes on AVX-512: all levels in registers.
//
//   8 bits    64 codes at a time: the 256 levels are bytes in four registers, vpermi2b looks up
//             either half of the table and the top bit of the code chooses
//   16 bits   16 codes at a time: the cosine from a quarter of a turn in four registers
#include "fast.h"

#if RS_FAST_X86
#include "../codecs/cyclic_scalar.h"

#include "avx512.h"

namespace rs {
namespace {

RS_INLINE void store(float* w, __m512 value) { _mm512_storeu_ps(w, value); }
RS_INLINE void store(uint16_t* w, __m512 value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(w),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(value), 16)));
}

template <class T>
void decode8(const Layer& layer, int64_t row0, int64_t row1, T* w) {
  const int8_t* levels = kCyclicScalar[0][0];
  const __m512i t0 = load(levels), t1 = load(levels + 64), t2 = load(levels + 128),
                t3 = load(levels + 192);
  const int64_t n = layer.tile_cols(), group = layer.tile.cols;
  const uint8_t* codes = layer.codes + row0 * n * group;
  for (int64_t t = row0 * n; t < row1 * n; ++t) {
    const __m512 step = _mm512_set1_ps(quiet(CyclicScalar<8>::step(layer.params[0][t])));
    for (int64_t j = 0; j < group; j += 64, codes += 64, w += 64) {
      const __m512i c = load(codes);
      const __m512i level =
          _mm512_mask_blend_epi8(_mm512_movepi8_mask(c), _mm512_permutex2var_epi8(t0, c, t1),
                                 _mm512_permutex2var_epi8(t2, c, t3));
      const __m128i part[4] = {_mm512_castsi512_si128(level), _mm512_extracti32x4_epi32(level, 1),
                               _mm512_extracti32x4_epi32(level, 2),
                               _mm512_extracti32x4_epi32(level, 3)};
      for (int i = 0; i < 4; ++i)
        store(w + 16 * i, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(part[i])), step));
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
      store(w, _mm512_mul_ps(_mm512_mul_ps(value, _mm512_mul_ps(amp, unit)), scale));
    }
  }
}

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {

void cyclic_scalar_avx512_slots(Row& row, int bits, int64_t group) {
  if (bits == 8 && group % 64 == 0) {
    row.decode = decode8<float>;
    row.decode_bf16 = decode8<uint16_t>;
  }
  if (bits == 16 && group % 16 == 0) {
    row.decode = decode16<float>;
    row.decode_bf16 = decode16<uint16_t>;
  }
}

}  // namespace rs
#endif
