// ultra on AVX-512: four vectors to a register, loaded from the codebook as the layer sees it.
#include "../codecs/ultra.h"
#include "fast.h"

#if RS_FAST_X86
#include "lanes.h"

#include "avx512.h"
#include "lanes_avx512.h"
#include "ultra_vectors.h"

namespace rs {
namespace {

struct UltraRows {
  static constexpr bool kGrouped = false;
  const Layer& layer;
  alignas(16) float vector[Ultra::kVectors][4];

  explicit UltraRows(const Layer& layer) : layer(layer) {
    ultra_vectors(layer, vector);
    for (auto& all : vector)
      for (float& entry : all) entry = quiet(entry);
  }

  RS_INLINE __m128 at(uint32_t bytes) const {
    constexpr uint32_t kMask = (Ultra::kVectors - 1) * 16;
    return _mm_load_ps(
        reinterpret_cast<const float*>(reinterpret_cast<const char*>(vector) + (bytes & kMask)));
  }
  // The four vectors of a tile, five bytes.
  RS_INLINE __m512 tile(const uint8_t* codes) const {
    uint32_t low;
    uint16_t high;
    __builtin_memcpy(&low, codes, sizeof low);
    __builtin_memcpy(&high, codes + 3, sizeof high);
    const __m512 first = _mm512_insertf32x4(_mm512_castps128_ps512(at(low << 4)), at(low >> 6), 1);
    const __m512 three = _mm512_insertf32x4(first, at(low >> 16), 2);
    return _mm512_insertf32x4(three, at(static_cast<uint32_t>(high) >> 2), 3);
  }
  template <class Visit>
  RS_INLINE void each(int64_t row, int64_t tile0, int64_t tile1, Visit visit) const {
    const uint8_t* codes = layer.codes + (row * layer.tile_cols() + tile0) * 5;
    int64_t t = tile0;
    for (; t + 4 <= tile1; t += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i, codes += 5) visit(i, 16 * (t + i), tile(codes), 0xFFFF);
    for (; t < tile1; ++t, codes += 5) visit(0, 16 * t, tile(codes), 0xFFFF);
  }
};

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {

void ultra_avx512_slots(Row& row) { fill_float_slots<UltraRows>(row); }

}  // namespace rs
#endif
