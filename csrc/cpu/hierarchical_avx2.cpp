// Hierarchical codes on AVX2, in float32: a tile is a register of eight lanes, each shifted to its
// own delta.
#include "fast.h"

#if RS_FAST_X86
#include <cstring>

#include "../codecs/hierarchical.h"
#include "lanes.h"

namespace rs {
namespace {

constexpr float kCosines[16] = {127,  117,  90,  49,  0, -49, -90, -117,
                                -127, -117, -90, -49, 0, 49,  90,  117};

}  // namespace
}  // namespace rs

#include "lanes_avx2.h"

namespace rs {
namespace {

struct MulValues {
  FloatTable<4> multipliers;
  RS_INLINE explicit MulValues(const float* table) : multipliers(table) {}
  RS_INLINE __m256 operator()(uint32_t tile, __m256i, __m256i delta) const {
    const float base = static_cast<float>(static_cast<int16_t>(tile)) * (1.0f / 512);
    return _mm256_mul_ps(_mm256_set1_ps(base), multipliers(delta));
  }
};

struct XorValues {
  FloatTable<16> levels, cosines;
  RS_INLINE explicit XorValues(const float* table) : levels(table), cosines(kCosines) {}
  RS_INLINE __m256 operator()(uint32_t, __m256i tile, __m256i delta) const {
    const __m256i masks = _mm256_setr_epi32(0, 0xF0, 0xF00, 0xFF, 0, 0xF0, 0xF00, 0xFF);
    const __m256i code = _mm256_xor_si256(tile, _mm256_permutevar8x32_epi32(masks, delta));
    // Lookups heed the low four bits: those above the phase and the level need no mask.
    const __m256i turn =
        _mm256_add_epi32(_mm256_srli_epi32(code, 12),
                         _mm256_and_si256(_mm256_srli_epi32(code, 8), _mm256_set1_epi32(12)));
    const __m256i amp = _mm256_add_epi32(
        _mm256_and_si256(_mm256_srli_epi32(code, 4), _mm256_set1_epi32(63)), _mm256_set1_epi32(1));
    const __m256 size = _mm256_mul_ps(_mm256_cvtepi32_ps(amp), _mm256_set1_ps(1.0f / 8192));
    return _mm256_mul_ps(_mm256_mul_ps(cosines(turn), size), levels(code));  // the first is exact
  }
};

template <class Values>
struct HierarchicalRows {
  template <class Visit>
  RS_INLINE static void each(const Layer& layer, int64_t row, Visit visit) {
    const Values values(layer.params[0]);
    const __m256i shift = _mm256_setr_epi32(16, 18, 20, 22, 24, 26, 28, 30);
    const int64_t tiles = layer.tile_cols();
    const uint8_t* codes = layer.codes + row * tiles * 4;
    const auto one = [&](int i, int64_t tile) RS_LAMBDA {
      uint32_t word;
      std::memcpy(&word, codes + 4 * tile, 4);
      const __m256i lanes = _mm256_set1_epi32(static_cast<int>(word));
      visit(i, 8 * tile, values(word, lanes, _mm256_srlv_epi32(lanes, shift)), 8);
    };
    int64_t tile = 0;
    for (; tile + 4 <= tiles; tile += 4) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) one(i, tile + i);
    }
    for (; tile < tiles; ++tile) one(0, tile);
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
