// block_sparse on AVX-512: a 4 x 4 tile is one register, its values spread to the ones of the mask
// by one expand; a 1 x 8 tile is half of one.
#include "block_sparse_fast.h"

#if RS_FAST_X86
#include <cstring>

#include "../codecs/block_sparse.h"
#include "avx512.h"

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

template <class Codec>
RS_INLINE __m512 square(const uint8_t* tile, const typename Codec::Tables& t, __m512 scale) {
  int32_t four;
  memcpy(&four, tile + Codec::kValues, 4);
  // Lanes from the fourth on are zero: what ones beyond it would get.
  const __m512 values = _mm512_maskz_mul_ps(
      0xF, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_cvtsi32_si128(four))), scale);
  uint32_t mask;
  if constexpr (Codec::kBytes == 6) {
    uint16_t stored;
    memcpy(&stored, tile, 2);
    mask = stored;
  } else {
    mask = t.masks[tile[0]];
  }
  return _mm512_maskz_expand_ps(static_cast<__mmask16>(mask), values);
}

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

void row_tiles(const uint8_t* tile, int64_t tiles, float scale, const float (*cosines)[8],
               float* w) {
  for (; tiles > 0; --tiles, tile += 3, w += 8) {
    const float size = static_cast<float>(static_cast<int8_t>(tile[1])) * scale;
    _mm256_storeu_ps(
        w, _mm256_maskz_mul_ps(tile[0], _mm256_set1_ps(size), _mm256_loadu_ps(cosines[tile[2]])));
  }
}

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {
namespace {

template <class Codec>
void decode_square(const Layer& layer, int64_t row0, int64_t row1, float* w) {
  square_rows<Codec>(layer, row0, row1, typename Codec::Tables(layer), w);
}

void decode_row(const Layer& layer, int64_t row0, int64_t row1, float* w) {
  const RowSparse::Tables tables(layer);
  const int64_t n = layer.tile_cols();
  row_tiles(layer.codes + row0 * n * 3, (row1 - row0) * n, tables.scale, tables.cosine.at, w);
}

}  // namespace

void block_sparse_avx512_slots(Row& row, bool square, bool mask16) {
  row.decode = !square  ? decode_row
               : mask16 ? decode_square<SquareSparse<true>>
                        : decode_square<SquareSparse<false>>;
  row.adjoint = !square  ? block_sparse_adjoint<decode_row>
                : mask16 ? block_sparse_adjoint<decode_square<SquareSparse<true>>>
                         : block_sparse_adjoint<decode_square<SquareSparse<false>>>;
}

}  // namespace rs
#endif
