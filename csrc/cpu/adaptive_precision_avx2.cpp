// adaptive_precision on AVX2: half a group at a time, by one byte shuffle and one shift by lane,
// from a copy of the tile that may be read past its end.
#include "adaptive_precision_fast.h"

#if RS_FAST_X86
#include <cstring>
#include <vector>

namespace rs {
namespace {
constexpr AdaptiveUnpack kUnpack(8);
}  // namespace
}  // namespace rs

#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")

namespace rs {
namespace {

void decode_tile(const uint8_t* tile, int64_t groups, int64_t bytes, const float* scales,
                 float* w) {
  int64_t at = (groups + 3) / 4;
  for (int64_t g = 0; g < groups; ++g, w += 16) {
    const int k = kAdaptiveClass[tile[g / 4] >> (2 * (g % 4)) & 3];
    const auto& kind = kUnpack.kind[k];
    const bool inside = at + kind.size <= bytes;
    const __m256 kept = _mm256_castsi256_ps(_mm256_set1_epi32(inside ? -1 : 0));
    const __m256i top = _mm256_set1_epi32(kind.top);
    const __m256 scale = _mm256_set1_ps(scales[k]);
    for (int half = 0; half < 2; ++half) {
      const uint8_t* from = tile + (inside ? at + half * kind.size / 2 : 0);
      const __m256i stored =
          _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
      const __m256i pair = _mm256_shuffle_epi8(
          stored, _mm256_load_si256(reinterpret_cast<const __m256i*>(kind.bytes)));
      const __m256i code = _mm256_and_si256(
          _mm256_srlv_epi32(pair, _mm256_load_si256(reinterpret_cast<const __m256i*>(kind.shift))),
          top);
      const __m256i level = _mm256_sub_epi32(_mm256_add_epi32(code, code), top);
      const __m256 share = _mm256_mul_ps(_mm256_cvtepi32_ps(level), _mm256_set1_ps(kind.unit));
      _mm256_storeu_ps(w + 8 * half, _mm256_and_ps(kept, _mm256_mul_ps(share, scale)));
    }
    at += kind.size;
  }
}

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {

void adaptive_precision_avx2_slots(Row& row) {
  row.decode = [](const Layer& layer, int64_t row0, int64_t row1, float* w) {
    const int64_t bytes = layer.tile.bytes, n = layer.tile_cols();
    std::vector<uint8_t> copy(static_cast<size_t>(bytes + 16));
    for (int64_t t = row0 * n; t < row1 * n; ++t, w += layer.tile.cols) {
      std::memcpy(copy.data(), layer.codes + t * bytes, static_cast<size_t>(bytes));
      decode_tile(copy.data(), layer.tile.cols / kAdaptiveGroup, bytes, layer.params[0] + t * 3, w);
    }
  };
}

}  // namespace rs
#endif
