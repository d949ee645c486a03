// block_sparse on AVX2: a tile's four values, spread over two registers by a table of permutations
// (one entry of 16 places per mask of the layer); a 1 x 8 tile is one register.
#include "block_sparse_fast.h"

#if RS_FAST_X86
#include <cstring>
#include <memory>

#include "../codecs/block_sparse.h"

#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")

namespace rs {
namespace {

// place[p]: which value goes to weight p of the tile; 4 for none.
struct Places {
  int8_t place[16];
};

void square_rows(const uint8_t* tile, const Places* places, float unit, int64_t rows, int64_t n,
                 float* w) {
  const __m256 scale = _mm256_set1_ps(unit);
  const int64_t in = 4 * n;
  const __m256 none = _mm256_setzero_ps();
  for (int64_t r = 0; r < rows; r += 4, w += 4 * in)
    for (int64_t c = 0; c < n; ++c, tile += 5) {
      int32_t four;
      memcpy(&four, tile + 1, 4);
      const __m256 values = _mm256_blend_ps(
          none, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi32_si128(four))), scale),
          0xF);
      const int8_t* place = places[tile[0]].place;
      for (int half = 0; half < 2; ++half) {
        const __m256i at = _mm256_cvtepi8_epi32(
            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(place + 8 * half)));
        const __m256 two = _mm256_permutevar8x32_ps(values, at);
        float* out = w + 4 * c + 2 * half * in;
        _mm_storeu_ps(out, _mm256_castps256_ps128(two));
        _mm_storeu_ps(out + in, _mm256_extractf128_ps(two, 1));
      }
    }
}

void row_tiles(const uint8_t* tile, int64_t tiles, float scale, const float (*cosines)[8],
               float* w) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  for (; tiles > 0; --tiles, tile += 3, w += 8) {
    const float size = static_cast<float>(static_cast<int8_t>(tile[1])) * scale;
    const __m256i kept =
        _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(tile[0]), bits), bits);
    _mm256_storeu_ps(w, _mm256_and_ps(_mm256_castsi256_ps(kept),
                                      _mm256_mul_ps(_mm256_set1_ps(size),
                                                    _mm256_loadu_ps(cosines[tile[2]]))));
  }
}

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {
namespace {

void decode_square(const Layer& layer, int64_t row0, int64_t row1, float* w) {
  const SquareSparse<false>::Tables tables(layer);
  const auto places = std::make_unique<Places[]>(256);
  for (int m = 0; m < 256; ++m) {
    int8_t n = 0;
    for (int p = 0; p < 16; ++p) places[m].place[p] = tables.masks[m] >> p & 1 ? n++ : int8_t{4};
  }
  const int64_t n = layer.tile_cols();
  square_rows(layer.codes + row0 / 4 * n * 5, places.get(), tables.scale, row1 - row0, n, w);
}

void decode_row(const Layer& layer, int64_t row0, int64_t row1, float* w) {
  const RowSparse::Tables tables(layer);
  const int64_t n = layer.tile_cols();
  row_tiles(layer.codes + row0 * n * 3, (row1 - row0) * n, tables.scale, tables.cosine.at, w);
}

}  // namespace

void block_sparse_avx2_slots(Row& row, bool square, bool mask16) {
  if (!square)
    row.decode = decode_row;
  else if (!mask16)
    row.decode = decode_square;
}

}  // namespace rs
#endif
