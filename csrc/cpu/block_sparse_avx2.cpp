// block_sparse on AVX2: a tile's four values, spread over two registers by a permutation: from a
// table of 256 for pattern numbers, put together from the four rows of a free mask. A 1 x 8 tile is
// one register.
#include "block_sparse_fast.h"

#if RS_FAST_X86
#include <cstring>
#include <memory>

#include "../codecs/block_sparse.h"

#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt")

namespace rs {
namespace {

// place[p]: which value goes to weight p of the tile; 4 for none.
struct Places {
  int8_t place[16];
};

// For a row's four bits of a mask and the ones before them, which value goes to each column.
struct RowPlaces {
  int8_t place[5][16][4];
  constexpr RowPlaces() : place() {
    for (int before = 0; before < 5; ++before)
      for (int bits = 0; bits < 16; ++bits)
        for (int j = 0, n = before; j < 4; ++j)
          place[before][bits][j] = static_cast<int8_t>(bits >> j & 1 && n < 4 ? n++ : 4);
  }
};

// place: 16 entries.
__attribute__((always_inline)) inline void store_tile(const uint8_t* four, __m128i place,
                                                      __m256 scale, float* w, int64_t in) {
  int32_t bytes;
  memcpy(&bytes, four, 4);
  const __m256 all = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi32_si128(bytes)));
  // Value 4 is zero.
  const __m256 values = _mm256_blend_ps(_mm256_setzero_ps(), _mm256_mul_ps(all, scale), 0xF);
  for (int half = 0; half < 2; ++half, w += 2 * in, place = _mm_srli_si128(place, 8)) {
    const __m256 two = _mm256_permutevar8x32_ps(values, _mm256_cvtepi8_epi32(place));
    _mm_storeu_ps(w, _mm256_castps256_ps128(two));
    _mm_storeu_ps(w + in, _mm256_extractf128_ps(two, 1));
  }
}

void square_rows(const uint8_t* tile, const Places* places, float unit, int64_t rows, int64_t n,
                 float* w) {
  const __m256 scale = _mm256_set1_ps(unit);
  const int64_t in = 4 * n;
  for (int64_t r = 0; r < rows; r += 4, w += 4 * in)
    for (int64_t c = 0; c < n; ++c, tile += 5)
      store_tile(tile + 1, _mm_loadu_si128(reinterpret_cast<const __m128i*>(places[tile[0]].place)),
                 scale, w + 4 * c, in);
}

void mask_rows(const uint8_t* tile, const RowPlaces& places, float unit, int64_t rows, int64_t n,
               float* w) {
  const __m256 scale = _mm256_set1_ps(unit);
  const int64_t in = 4 * n;
  for (int64_t r = 0; r < rows; r += 4, w += 4 * in)
    for (int64_t c = 0; c < n; ++c, tile += 6) {
      int32_t place[4];
      for (int i = 0, before = 0; i < 4; ++i) {
        const int bits = tile[i / 2] >> (4 * (i % 2)) & 15;
        memcpy(&place[i], places.place[before][bits], 4);
        before = before + __builtin_popcount(static_cast<unsigned>(bits));
        before = before < 4 ? before : 4;
      }
      store_tile(tile + 2, _mm_setr_epi32(place[0], place[1], place[2], place[3]), scale, w + 4 * c,
                 in);
    }
}

void row_tiles(const uint8_t* tile, int64_t tiles, float scale, const float (*cosines)[8],
               float* w) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  for (; tiles > 0; --tiles, tile += 3, w += 8) {
    const float size = static_cast<float>(static_cast<int8_t>(tile[1])) * scale;
    const __m256i kept =
        _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(tile[0]), bits), bits);
    _mm256_storeu_ps(
        w, _mm256_and_ps(_mm256_castsi256_ps(kept),
                         _mm256_mul_ps(_mm256_set1_ps(size), _mm256_loadu_ps(cosines[tile[2]]))));
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

void decode_mask16(const Layer& layer, int64_t row0, int64_t row1, float* w) {
  static constexpr RowPlaces kPlaces;
  const int64_t n = layer.tile_cols();
  mask_rows(layer.codes + row0 / 4 * n * 6, kPlaces, layer.params[0][0], row1 - row0, n, w);
}

void decode_row(const Layer& layer, int64_t row0, int64_t row1, float* w) {
  const RowSparse::Tables tables(layer);
  const int64_t n = layer.tile_cols();
  row_tiles(layer.codes + row0 * n * 3, (row1 - row0) * n, tables.scale, tables.cosine.at, w);
}

}  // namespace

void block_sparse_avx2_slots(Row& row, bool square, bool mask16) {
  row.decode = !square ? decode_row : mask16 ? decode_mask16 : decode_square;
  row.adjoint = !square  ? block_sparse_adjoint<decode_row>
                : mask16 ? block_sparse_adjoint<decode_mask16>
                         : block_sparse_adjoint<decode_square>;
}

}  // namespace rs
#endif
