// Switches this file to AVX2 up to its `#pragma GCC pop_options`; products of codes that are
// decoded to float32 in registers. Internal to its file, as avx512.h is.
#pragma once

#include <immintrin.h>

#include "inline.h"
#include "lanes.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma")

namespace rs {
namespace {

RS_INLINE __m256i load_words(const uint32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

RS_INLINE uint32_t load_word(const uint8_t* p) {
  uint32_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return word;
}

// The first `count` lanes, of 8.
RS_INLINE __m256i first_of_eight(int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
}
RS_INLINE float sum_lanes(__m256 x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
RS_INLINE __m256 load_some(const float* x, int64_t count) {
  return count == 8 ? _mm256_loadu_ps(x) : _mm256_maskload_ps(x, first_of_eight(count));
}
RS_INLINE void store_some(float* w, __m256 x, int64_t count) {
  if (count == 8) return _mm256_storeu_ps(w, x);
  _mm256_maskstore_ps(w, first_of_eight(count), x);
}

// For lanes_float.h: some lanes are the first so many.
using Floats = __m256;
using Some = int64_t;
constexpr bool kStoresBf16 = false;
RS_INLINE Floats add_product(Floats sum, Floats a, Floats b) { return _mm256_fmadd_ps(a, b, sum); }

}  // namespace
}  // namespace rs

#include "lanes_float.h"

namespace rs {
namespace {

// Up to sixteen floats to look up by the low bits of a code: 2 for 4 of them, 3 for 8, 4 for 16.
template <int Entries>
struct FloatTable {
  __m256 low, high;

  RS_INLINE explicit FloatTable(const float* values) {
    if constexpr (Entries >= 8) {
      low = _mm256_loadu_ps(values);
      high = _mm256_loadu_ps(values + Entries - 8);
    } else if constexpr (Entries == 4) {
      low = high = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(values));
    } else {
      low = high = _mm256_setr_ps(values[0], values[1], values[0], values[1], values[0], values[1],
                                  values[0], values[1]);
    }
  }
  RS_INLINE __m256 operator()(__m256i code) const {
    if constexpr (Entries <= 4) return _mm256_permutevar_ps(low, code);
    const __m256 first = _mm256_permutevar8x32_ps(low, code);
    if constexpr (Entries <= 8) return first;
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
    return _mm256_blendv_ps(first, _mm256_permutevar8x32_ps(high, code), upper);
  }
};

// Vectors of weights that codes stand for.
template <int N, int Width>
struct VectorTable {
  alignas(32) float at[N][Width];
};

// Two vectors of four, at these bytes of a table.
RS_INLINE __m256 two_vectors(const void* table, uint32_t first, uint32_t second) {
  const auto* at = static_cast<const uint8_t*>(table);
  return _mm256_insertf128_ps(
      _mm256_castps128_ps256(_mm_load_ps(reinterpret_cast<const float*>(at + first))),
      _mm_load_ps(reinterpret_cast<const float*>(at + second)), 1);
}

// Tiles [tile0, tile1) of a row, of four codes of ten bits, a vector of four weights each.
template <class Visit>
RS_INLINE void ten_bit_vectors(const Layer& layer, int64_t row, int64_t tile0, int64_t tile1,
                               const VectorTable<1024, 4>& table, Visit visit) {
  constexpr uint32_t kMask = 1023 * 16;
  const uint8_t* tile = layer.codes + (row * layer.tile_cols() + tile0) * 5;
  const auto one = [&](int i, int64_t j) RS_LAMBDA {
    const uint32_t low = load_word(tile);
    uint16_t high;
    __builtin_memcpy(&high, tile + 3, sizeof high);
    visit(i, j, two_vectors(table.at, low << 4 & kMask, low >> 6 & kMask), 8);
    visit(i + 1, j + 8,
          two_vectors(table.at, low >> 16 & kMask, static_cast<uint32_t>(high) >> 2 & kMask), 8);
    tile += 5;
  };
  int64_t t = tile0;
  for (; t + 2 <= tile1; t += 2) one(0, t * 16), one(2, t * 16 + 16);
  if (t < tile1) one(0, t * 16);
}

}  // namespace
}  // namespace rs
