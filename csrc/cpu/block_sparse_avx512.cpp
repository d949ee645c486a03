// block_sparse on AVX-512: a 4 x 4 tile is one register, its values spread to the ones of the mask
// by one expand, or as bytes by one shuffle; a 1 x 8 tile is half of one.
#include "block_sparse_fast.h"

#if RS_FAST_X86
#include <cstring>

#include "lanes.h"

#include "avx512.h"
#include "lanes_avx512.h"

namespace rs {
namespace {

// Two rows of two neighbouring tiles a, b each: 8 floats to w and 8 to w + in.
RS_INLINE void store_pair(float* w, int64_t in, __m512 a, __m512 b) {
  const __m512 low = _mm512_shuffle_f32x4(a, b, 0x44), high = _mm512_shuffle_f32x4(a, b, 0xEE);
  // low: a0 a1 b0 b1 -> a0 b0 a1 b1
  const __m512 first = _mm512_shuffle_f32x4(low, low, 0xD8);
  const __m512 second = _mm512_shuffle_f32x4(high, high, 0xD8);
  _mm256_storeu_ps(w, _mm512_castps512_ps256(first));
  _mm256_storeu_ps(w + in, _mm512_extractf32x8_ps(first, 1));
  _mm256_storeu_ps(w + 2 * in, _mm512_castps512_ps256(second));
  _mm256_storeu_ps(w + 3 * in, _mm512_extractf32x8_ps(second, 1));
}

// A tile's four values, and zeros behind: what ones of a mask beyond the fourth would get.
RS_INLINE __m128i four_values(const uint8_t* values) {
  int32_t four;
  memcpy(&four, values, 4);
  return _mm_cvtsi32_si128(four);
}
RS_INLINE __m128i places(const auto& tiles, const uint8_t* tile) {
  return _mm_set_epi64x(std::bit_cast<int64_t>(tiles.of(tile, 1)),
                        std::bit_cast<int64_t>(tiles.of(tile, 0)));
}
template <class Codec>
RS_INLINE __mmask16 mask_of(const uint8_t* tile, const typename Codec::Tables& t) {
  if constexpr (Codec::kBytes == 5) return t.masks[tile[0]];
  uint16_t stored;
  memcpy(&stored, tile, 2);
  return stored;
}
template <class Codec>
RS_INLINE __m512 square(const uint8_t* tile, const typename Codec::Tables& t, __m512 scale) {
  const __m512 values = _mm512_maskz_mul_ps(
      0xF, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(four_values(tile + Codec::kValues))), scale);
  return _mm512_maskz_expand_ps(mask_of<Codec>(tile, t), values);
}

// Rows of x times rows of tiles, as they are stored: the scale comes last.
template <class Tiles, int B>
void square_product(const Layer& layer, const float* x, int64_t m, float* y, int64_t row0,
                    int64_t row1) {
  constexpr int kSums = B <= 2 ? 4 : 8 / B;  // independent, so that additions need not wait
  const Tiles tiles(layer);
  const RowStarts<B> from(x, m, layer.in);
  const int64_t n = layer.tile_cols();
  for (int64_t row = row0; row < row1; row += 4) {
    const uint8_t* tile = layer.codes + row / 4 * n * Tiles::kBytes;
    prefetch_tiles(layer, (row / 4 + 1) * n, (row / 4 + 2) * n);
    __m512 total[kSums][B];
    for (auto& sums : total)
      for (__m512& sum : sums) sum = _mm512_setzero_ps();
    const auto add = [&](int i, int64_t c) RS_LAMBDA {
      const __m128i bytes =
          _mm_shuffle_epi8(four_values(tile + Tiles::kValues), places(tiles, tile));
      const __m512 w = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) {
        const __m128 four = _mm_loadu_ps(from.at[b] + 4 * c);
        total[i][b] = _mm512_fmadd_ps(w, _mm512_broadcast_f32x4(four), total[i][b]);
      }
      tile += Tiles::kBytes;
    };
    int64_t c = 0;
    for (; c + kSums <= n; c += kSums)
#pragma GCC unroll 4
      for (int i = 0; i < kSums; ++i) add(i, c + i);
    for (; c < n; ++c) add(0, c);
    for (int b = 0; b < B && b < m; ++b) {
      for (int i = 1; i < kSums; ++i) total[0][b] = _mm512_add_ps(total[0][b], total[i][b]);
      const __m512 pairs = _mm512_add_ps(total[0][b], _mm512_permute_ps(total[0][b], 0xB1));
      const __m512 fours = _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0x4E));
      const __m128 four = _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, fours));
      _mm_storeu_ps(y + b * layer.out + row, _mm_mul_ps(four, _mm_set1_ps(layer.params[0][0])));
    }
  }
}
template <class Tiles>
constexpr FloatKernel kSquareKernels[4] = {square_product<Tiles, 1>, square_product<Tiles, 2>,
                                           square_product<Tiles, 4>, square_product<Tiles, 8>};

template <class Codec>
void square_rows(const Layer& layer, int64_t row0, int64_t row1, const typename Codec::Tables& t,
                 float* w) {
  const __m512 scale = _mm512_set1_ps(t.scale);
  const int64_t n = layer.tile_cols(), in = layer.in;
  const uint8_t* tile = layer.codes + row0 / 4 * n * Codec::kBytes;
  for (int64_t r = row0; r < row1; r += 4, w += 4 * in) {
    int64_t c = 0;
    for (; c + 2 <= n; c += 2, tile += 2 * Codec::kBytes)
      store_pair(w + 4 * c, in, square<Codec>(tile, t, scale),
                 square<Codec>(tile + Codec::kBytes, t, scale));
    if (c < n) {
      const __m512 last = square<Codec>(tile, t, scale);
      _mm_storeu_ps(w + 4 * c, _mm512_castps512_ps128(last));
      _mm_storeu_ps(w + 4 * c + in, _mm512_extractf32x4_ps(last, 1));
      _mm_storeu_ps(w + 4 * c + 2 * in, _mm512_extractf32x4_ps(last, 2));
      _mm_storeu_ps(w + 4 * c + 3 * in, _mm512_extractf32x4_ps(last, 3));
      tile += Codec::kBytes;
    }
  }
}

struct CosineRows : CosineTables {
  static constexpr bool kGrouped = false;
  const Layer& layer;

  explicit CosineRows(const Layer& layer) : CosineTables(layer), layer(layer) {}
  RS_INLINE __m256 one(const uint8_t* tile) const {
    return _mm256_maskz_mul_ps(tile[0], _mm256_set1_ps(sizes[tile[1]]),
                               _mm256_loadu_ps(cosines[tile[2]]));
  }
  RS_INLINE __m512 two(const uint8_t* tile) const {
    return _mm512_insertf32x8(_mm512_castps256_ps512(one(tile)), one(tile + 3), 1);
  }
  template <class Visit>
  RS_INLINE void each(int64_t row, int64_t tile0, int64_t tile1, Visit visit) const {
    const uint8_t* tile = layer.codes + (row * layer.tile_cols() + tile0) * 3;
    int64_t t = tile0;
    for (; t + 8 <= tile1; t += 8)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i, tile += 6) visit(i, 8 * t + 16 * i, two(tile), 0xFFFF);
    for (; t + 2 <= tile1; t += 2, tile += 6) visit(0, 8 * t, two(tile), 0xFFFF);
    if (t < tile1) visit(0, 8 * t, _mm512_zextps256_ps512(one(tile)), 0xFF);
  }
};

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {
namespace {

template <class Codec>
void decode_square(const Layer& layer, int64_t row0, int64_t row1, float* w) {
  square_rows<Codec>(layer, row0, row1, typename Codec::Tables(layer), w);
}

template <class Codec, class Tiles>
void fill_square(Row& row) {
  row.decode = decode_square<Codec>;
  row.adjoint = block_sparse_adjoint<decode_square<Codec>>;
  row.linear = [](const Layer& layer, const float* x, int64_t m, float* y) {
    float_linear(layer, x, m, y, kSquareKernels<Tiles>);
  };
  row.linear_max_m = kMaxBatch;
}

}  // namespace

void block_sparse_avx512_slots(Row& row, bool square, bool mask16) {
  if (square)
    return mask16 ? fill_square<SquareSparse<true>, MaskPlaces>(row)
                  : fill_square<SquareSparse<false>, PatternPlaces>(row);
  fill_float_slots<CosineRows>(row);
  row.adjoint = block_sparse_adjoint<decode_rows<CosineRows, float>>;
}

}  // namespace rs
#endif
