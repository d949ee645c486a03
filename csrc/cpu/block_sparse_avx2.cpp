// block_sparse on AVX2: a tile's four values, spread over two registers of two rows each by
// permutations from tables: of whole pattern numbers, or of the bytes of a free mask. A 1 x 8 tile
// is one register.
#include "block_sparse_fast.h"

#if RS_FAST_X86
#include "lanes_avx2.h"

namespace rs {
namespace {

// The tile's values, and zeros in lanes 4 to 7.
template <class Tiles>
RS_INLINE __m256 four_values(const uint8_t* tile) {
  const auto bytes = static_cast<int>(load_word(tile + Tiles::kValues));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi32_si128(bytes)));
}
RS_INLINE __m256 two_rows(__m256 values, const Places& places) {
  const __m128i place = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(places.at));
  return _mm256_permutevar8x32_ps(values, _mm256_cvtepi8_epi32(place));
}

template <class Tiles>
void decode_square(const Layer& layer, int64_t row0, int64_t row1, float* w) {
  const Tiles tiles(layer);
  const __m256 scale = _mm256_set1_ps(layer.params[0][0]);
  const int64_t n = layer.tile_cols(), in = layer.in;
  const uint8_t* tile = layer.codes + row0 / 4 * n * Tiles::kBytes;
  for (int64_t r = row0; r < row1; r += 4, w += 4 * in)
    for (int64_t c = 0; c < n; ++c, tile += Tiles::kBytes) {
      // A zero is +0 whatever the scale.
      const __m256 values =
          _mm256_blend_ps(_mm256_setzero_ps(), _mm256_mul_ps(four_values<Tiles>(tile), scale), 0xF);
      for (int half = 0; half < 2; ++half) {
        const __m256 two = two_rows(values, tiles.of(tile, half));
        float* to = w + 2 * half * in + 4 * c;
        _mm_storeu_ps(to, _mm256_castps256_ps128(two));
        _mm_storeu_ps(to + in, _mm256_extractf128_ps(two, 1));
      }
    }
}

// B rows of x times a row of tiles, as they are stored: the scale comes last.
template <class Tiles, int B>
RS_INLINE void square_product(const Tiles& tiles, const Layer& layer, const RowStarts<B>& from,
                              int64_t m, float* y, int64_t row) {
  constexpr int kSums = B == 1 ? 2 : 1;  // independent, so that additions need not wait
  const int64_t n = layer.tile_cols();
  const uint8_t* tile = layer.codes + row / 4 * n * Tiles::kBytes;
  __m256 total[kSums][2][B];
  for (auto& halves : total)
    for (auto& sums : halves)
      for (__m256& sum : sums) sum = _mm256_setzero_ps();
  const auto add = [&](int i, int64_t c) RS_LAMBDA {
    const __m256 values = four_values<Tiles>(tile);
    const __m256 first = two_rows(values, tiles.of(tile, 0));
    const __m256 second = two_rows(values, tiles.of(tile, 1));
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      const __m256 v = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(from.at[b] + 4 * c));
      total[i][0][b] = _mm256_fmadd_ps(first, v, total[i][0][b]);
      total[i][1][b] = _mm256_fmadd_ps(second, v, total[i][1][b]);
    }
    tile += Tiles::kBytes;
  };
  int64_t c = 0;
  for (; c + kSums <= n; c += kSums)
#pragma GCC unroll 2
    for (int i = 0; i < kSums; ++i) add(i, c + i);
  if (c < n) add(0, c);
  for (int h = 0; h < 2; ++h)
    for (int b = 0; b < B && b < m; ++b) {
      for (int i = 1; i < kSums; ++i)
        total[0][h][b] = _mm256_add_ps(total[0][h][b], total[i][h][b]);
      __m256 s = _mm256_hadd_ps(total[0][h][b], total[0][h][b]);
      s = _mm256_hadd_ps(s, s);
      float* to = y + b * layer.out + row + 2 * h;
      to[0] = _mm256_cvtss_f32(s) * layer.params[0][0];
      to[1] = _mm_cvtss_f32(_mm256_extractf128_ps(s, 1)) * layer.params[0][0];
    }
}

template <class Tiles, int B>
void square_products(const Layer& layer, const float* x, int64_t m, float* y, int64_t row0,
                     int64_t row1) {
  constexpr int kMost = std::min(B, 4);  // rows of x whose sums are in registers
  const Tiles tiles(layer);
  const int64_t n = layer.tile_cols();
  for (int64_t row = row0; row < row1; row += 4) {
    prefetch_tiles(layer, (row / 4 + 1) * n, (row / 4 + 2) * n);
    for (int64_t b = 0; b < m; b += kMost) {
      const RowStarts<kMost> from(x + b * layer.in, m - b, layer.in);
      square_product(tiles, layer, from, m - b, y + b * layer.out, row);
    }
  }
}
template <class Tiles>
constexpr FloatKernel kSquareKernels[4] = {square_products<Tiles, 1>, square_products<Tiles, 2>,
                                           square_products<Tiles, 4>, square_products<Tiles, 8>};

// All bits or none, by a mask's bits.
struct LaneMasks {
  alignas(32) uint32_t at[256][8]{};
  constexpr LaneMasks() {
    for (int mask = 0; mask < 256; ++mask)
      for (int j = 0; j < 8; ++j) at[mask][j] = mask >> j & 1 ? ~0u : 0u;
  }
};
constexpr LaneMasks kLaneMasks;

struct CosineRows : CosineTables {
  static constexpr bool kGrouped = false;
  const Layer& layer;

  explicit CosineRows(const Layer& layer) : CosineTables(layer), layer(layer) {}
  template <class Visit>
  RS_INLINE void each(int64_t row, int64_t tile0, int64_t tile1, Visit visit) const {
    const uint8_t* tile = layer.codes + (row * layer.tile_cols() + tile0) * 3;
    const auto one = [&](int i, int64_t j) RS_LAMBDA {
      const __m256 w =
          _mm256_mul_ps(_mm256_broadcast_ss(sizes + tile[1]), _mm256_loadu_ps(cosines[tile[2]]));
      const auto* kept = reinterpret_cast<const float*>(kLaneMasks.at[tile[0]]);
      visit(i, j, _mm256_and_ps(w, _mm256_load_ps(kept)), 8);
      tile += 3;
    };
    int64_t t = tile0;
    for (; t + 4 <= tile1; t += 4) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) one(i, 8 * (t + i));
    }
    for (; t < tile1; ++t) one(0, 8 * t);
  }
};

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {
namespace {

template <class Tiles>
void square_linear(const Layer& layer, const float* x, int64_t m, float* y) {
  float_linear(layer, x, m, y, kSquareKernels<Tiles>);
}

template <class Tiles>
void fill_square(Row& row) {
  row.decode = decode_square<Tiles>;
  row.adjoint = block_sparse_adjoint<decode_square<Tiles>>;
  row.linear = square_linear<Tiles>;
  row.linear_max_m = kMaxBatch;
}

}  // namespace

void block_sparse_avx2_slots(Row& row, bool square, bool mask16) {
  if (square) return mask16 ? fill_square<MaskPlaces>(row) : fill_square<PatternPlaces>(row);
  fill_float_slots<CosineRows>(row);
  row.adjoint = block_sparse_adjoint<decode_rows<CosineRows, float>>;
}

}  // namespace rs
#endif
