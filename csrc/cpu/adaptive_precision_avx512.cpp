// adaptive_precision on AVX-512 (VBMI): one byte permute and one shift by lane for each group.
// What the permute brings into the upper bytes of a lane is masked away with the code.
#include "adaptive_precision_fast.h"

#if RS_FAST_X86
#include <algorithm>
#include <vector>

namespace rs {
namespace {
constexpr AdaptiveUnpack kUnpack(16);
}  // namespace
}  // namespace rs

#include "avx512.h"

namespace rs {
namespace {

// Reads up to 32 bytes past the tile.
RS_INLINE void decode_tile(const uint8_t* tile, int64_t groups, int64_t bytes, const float* scales,
                           float* w) {
  int64_t at = (groups + 3) / 4;
  for (int64_t g = 0; g < groups; ++g, w += 16) {
    const int k = kAdaptiveClass[tile[g / 4] >> (2 * (g % 4)) & 3];
    const auto& kind = kUnpack.kind[k];
    const bool inside = at + kind.size <= bytes;  // a group past the tile is zero
    const __m256i stored =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + (inside ? at : 0)));
    const __m512i pair = _mm512_permutexvar_epi8(load(kind.bytes), _mm512_castsi256_si512(stored));
    const __m512i code =
        _mm512_and_si512(_mm512_srlv_epi32(pair, load(kind.shift)), _mm512_set1_epi32(kind.top));
    const __m512i level =
        _mm512_sub_epi32(_mm512_add_epi32(code, code), _mm512_set1_epi32(kind.top));
    const __m512 share = _mm512_mul_ps(_mm512_cvtepi32_ps(level), _mm512_set1_ps(kind.unit));
    _mm512_storeu_ps(w, _mm512_maskz_mul_ps(inside ? 0xFFFF : 0, share, _mm512_set1_ps(scales[k])));
    at += kind.size;
  }
}

void decode_tiles(const uint8_t* tile, int64_t tiles, int64_t width, int64_t bytes,
                  const float* scales, float* w) {
  for (int64_t t = 0; t < tiles; ++t)
    decode_tile(tile + t * bytes, width / 16, bytes, scales + 3 * t, w + t * width);
}

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {

void adaptive_precision_avx512_slots(Row& row) {
  row.decode = [](const Layer& layer, int64_t row0, int64_t row1, float* w) {
    const int64_t n = layer.tile_cols(), bytes = layer.tile.bytes, width = layer.tile.cols;
    const int64_t first = row0 * n, last = row1 * n;
    // Tiles behind which there are 32 bytes of codes; the others from a copy with room.
    const int64_t all = layer.out * n, spare = (32 + bytes - 1) / bytes;
    const int64_t middle = std::clamp(all - spare, first, last);
    decode_tiles(layer.codes + first * bytes, middle - first, width, bytes,
                 layer.params[0] + first * 3, w);
    if (middle == last) return;
    std::vector<uint8_t> copy(static_cast<size_t>((last - middle) * bytes + 32));
    std::copy(layer.codes + middle * bytes, layer.codes + last * bytes, copy.begin());
    decode_tiles(copy.data(), last - middle, width, bytes, layer.params[0] + middle * 3,
                 w + (middle - first) * width);
  };
}

}  // namespace rs
#endif
