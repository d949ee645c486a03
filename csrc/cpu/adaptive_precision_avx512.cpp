// adaptive_precision on AVX-512 (VBMI): one byte permute and one shift by lane for each group.
#include "adaptive_precision_fast.h"

#if RS_FAST_X86

namespace rs {
namespace {
constexpr AdaptiveUnpack kUnpack(16);
constexpr uint8_t kNext[4] = {0, 1, 2, 2};  // class as stored -> class
}  // namespace
}  // namespace rs

#include "avx512.h"

namespace rs {
namespace {

void decode_tiles(const uint8_t* tile, int64_t tiles, int64_t groups, int64_t bytes,
                  const float* scales, float* w) {
  for (int64_t t = 0; t < tiles; ++t, tile += bytes, scales += 3) {
    int64_t at = (groups + 3) / 4;
    for (int64_t g = 0; g < groups; ++g, w += 16) {
      const int k = kNext[tile[g / 4] >> (2 * (g % 4)) & 3];
      const auto& kind = kUnpack.kind[k];
      // A group past the tile reads nothing and is zero.
      const bool inside = at + kind.size <= bytes;
      const auto mask = static_cast<__mmask32>(inside ? (1u << kind.size) - 1 : 0);
      const __m256i stored = _mm256_maskz_loadu_epi8(mask, tile + (inside ? at : 0));
      // permutexvar takes byte numbers mod 64, so the 0x80 of unused bytes would read byte 0.
      const __m512i pair = _mm512_maskz_permutexvar_epi8(
          0x3333333333333333ull, load(kind.bytes), _mm512_castsi256_si512(stored));
      const __m512i code = _mm512_and_si512(_mm512_srlv_epi32(pair, load(kind.shift)),
                                            _mm512_set1_epi32(kind.top));
      const __m512i level =
          _mm512_sub_epi32(_mm512_add_epi32(code, code), _mm512_set1_epi32(kind.top));
      const __m512 share = _mm512_mul_ps(_mm512_cvtepi32_ps(level), _mm512_set1_ps(kind.unit));
      _mm512_storeu_ps(
          w, _mm512_maskz_mul_ps(inside ? 0xFFFF : 0, share, _mm512_set1_ps(scales[k])));
      at += kind.size;
    }
  }
}

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {

void adaptive_precision_avx512_slots(Row& row) {
  row.decode = [](const Layer& layer, int64_t row0, int64_t row1, float* w) {
    const int64_t n = layer.tile_cols();
    decode_tiles(layer.codes + row0 * n * layer.tile.bytes, (row1 - row0) * n,
                 layer.tile.cols / kAdaptiveGroup, layer.tile.bytes,
                 layer.params[0] + row0 * n * 3, w);
  };
}

}  // namespace rs
#endif
