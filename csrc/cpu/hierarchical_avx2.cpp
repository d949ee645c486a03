// Hierarchical codes on AVX2, in float32: what the bases of eight tiles stand for is made at once,
// then each tile's eight lanes choose by their deltas.
#include "fast.h"

#if RS_FAST_X86
#include <cstring>

#include "../codecs/hierarchical.h"
#include "lanes_avx2.h"

namespace rs {
namespace {

// Spreads a tile's four values, by its deltas.
RS_INLINE __m256 spread(__m256 four, const uint8_t* tile) {
  const __m256i shift = _mm256_setr_epi32(16, 18, 20, 22, 24, 26, 28, 30);
  const auto word = static_cast<int>(load_word(tile));
  return _mm256_permutevar_ps(four, _mm256_srlv_epi32(_mm256_set1_epi32(word), shift));
}
RS_INLINE __m256 twice(const float* four) {
  return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(four));
}

struct MulValues {
  __m256 multipliers;
  RS_INLINE explicit MulValues(const float* table) : multipliers(twice(table)) {}

  // Of eight tiles: values[i] stands for the four of tile i.
  RS_INLINE void four(__m256i tiles, float* values) const {
    const __m256i base = _mm256_srai_epi32(_mm256_slli_epi32(tiles, 16), 16);
    _mm256_store_ps(values, _mm256_mul_ps(_mm256_cvtepi32_ps(base), _mm256_set1_ps(1.0f / 512)));
  }
  RS_INLINE __m256 weights(const float* values, int i, const uint8_t* tile) const {
    return _mm256_mul_ps(_mm256_broadcast_ss(values + i), spread(multipliers, tile));
  }
};

RS_INLINE __m256i upper(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x << 16)); }

// A base in the upper half of its lane: the product of a cosine and an amplitude, both bytes, lies
// there too, 2^16 times too large.
struct XorValues {
  FloatTable<16> levels, others;  // others: by 15 - idx, for the mask 0x00FF
  __m256i cosines;

  RS_INLINE explicit XorValues(const float* table) : levels(table), others(turned(table).at) {
    cosines =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kCyclic[0])));
  }
  struct Sixteen {
    float at[16];
  };
  static Sixteen turned(const float* table) {
    Sixteen t;
    for (int i = 0; i < 16; ++i) t.at[i] = table[15 - i];
    return t;
  }

  // values[4 * i]: the four of tile i.
  RS_INLINE void four(__m256i tiles, float* values) const {
    const __m256i phase = _mm256_slli_epi32(tiles, 4), low = upper(15);
    const __m256i diff = _mm256_and_si256(_mm256_slli_epi32(tiles, 8), upper(12));
    const __m256i turn = _mm256_and_si256(_mm256_add_epi32(phase, diff), low);
    const __m256i turn2 =
        _mm256_and_si256(_mm256_add_epi32(phase, _mm256_xor_si256(diff, upper(12))), low);
    const __m256i amp = _mm256_and_si256(_mm256_slli_epi32(tiles, 12), upper(63));
    const auto size = [&](__m256i turn, __m256i amp) RS_LAMBDA {
      const __m256i product =
          _mm256_maddubs_epi16(_mm256_add_epi32(amp, upper(1)), _mm256_shuffle_epi8(cosines, turn));
      return _mm256_mul_ps(_mm256_cvtepi32_ps(product), _mm256_set1_ps(0x1p-29f));  // exact
    };
    const __m256 size1 = size(turn, _mm256_xor_si256(amp, low));
    const __m256 level = levels(tiles);
    const __m256 w0 = _mm256_mul_ps(size(turn, amp), level), w1 = _mm256_mul_ps(size1, level);
    const __m256 w2 = _mm256_mul_ps(size(turn2, _mm256_xor_si256(amp, upper(48))), level);
    const __m256 w3 = _mm256_mul_ps(size1, others(tiles));
    const __m256 a = _mm256_unpacklo_ps(w0, w1), b = _mm256_unpackhi_ps(w0, w1);
    const __m256 c = _mm256_unpacklo_ps(w2, w3), d = _mm256_unpackhi_ps(w2, w3);
    const __m256 of[4] = {_mm256_shuffle_ps(a, c, 0x44), _mm256_shuffle_ps(a, c, 0xEE),
                          _mm256_shuffle_ps(b, d, 0x44), _mm256_shuffle_ps(b, d, 0xEE)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // of tiles i and i + 4
      _mm_store_ps(values + 4 * i, _mm256_castps256_ps128(of[i]));
      _mm_store_ps(values + 4 * (i + 4), _mm256_extractf128_ps(of[i], 1));
    }
  }
  RS_INLINE __m256 weights(const float* values, int i, const uint8_t* tile) const {
    return spread(twice(values + 4 * i), tile);
  }
};

template <class Values>
struct HierarchicalRows {
  static constexpr bool kGrouped = false;
  const Layer& layer;
  Values of;
  RS_INLINE explicit HierarchicalRows(const Layer& layer) : layer(layer), of(layer.params[0]) {}

  template <class Visit>
  RS_INLINE void each(int64_t row, int64_t tile0, int64_t tile1, Visit visit) const {
    const uint8_t* codes = layer.codes + (row * layer.tile_cols() + tile0) * 4;
    alignas(32) float values[32];
    int64_t t = tile0;
    for (; t + 8 <= tile1; t += 8, codes += 32) {
      of.four(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)), values);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) visit(i, 8 * (t + i), of.weights(values, i, codes + 4 * i), 8);
    }
    if (t == tile1) return;
    uint8_t last[32] = {};
    std::memcpy(last, codes, static_cast<size_t>(4 * (tile1 - t)));
    of.four(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(last)), values);
    for (int i = 0; t < tile1; ++i, ++t) visit(0, 8 * t, of.weights(values, i, last + 4 * i), 8);
  }
};

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {
void hierarchical_avx2_slots(Row& row, bool exclusive_or) {
  exclusive_or ? fill_float_slots<HierarchicalRows<XorValues>>(row)
               : fill_float_slots<HierarchicalRows<MulValues>>(row);
}

}  // namespace rs
#endif
