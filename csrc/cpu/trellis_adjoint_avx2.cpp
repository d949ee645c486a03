// Gradient of the trellis's table on AVX2: the states of a row of a tile are hashed at a time.
#include "fast.h"

#if RS_FAST_X86
#include "trellis_histograms.h"

#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")

#include "trellis_rows_avx2.h"

namespace rs {
namespace {

using Group = Additions<uint32_t>;

template <int K, int Row>
RS_INLINE void hash_states(const uint8_t* tile, const float* dw, Group& to) {
  constexpr int kFirst = Row % 4 * 8;
  const __m256i hashes = hash_row<K, Row>(tile);
  // Lanes 0 1 4 5 2 3 6 7 in the order of the weights.
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.offset + kFirst),
                      _mm256_permute4x64_epi64(point_offsets(hashes), 0b11'01'10'00));
  float* pair = to.pair[kFirst];
  _mm256_storeu_ps(pair, _mm256_xor_ps(_mm256_loadu_ps(dw), row_signs<0>(hashes)));
  _mm256_storeu_ps(pair + 8, _mm256_xor_ps(_mm256_loadu_ps(dw + 8), row_signs<1>(hashes)));
}

// Rows Row to Row + 3 of a tile; meanwhile the states before them are added, which waits for
// memory.
template <int K, int Row>
RS_INLINE void add_rows(const uint8_t* tile, const float* dw, int64_t in, Group (&turns)[2],
                        Histograms& sums) {
  Group& to = turns[Row / 4 % 2];
  hash_states<K, Row>(tile, dw + Row * in, to);
  hash_states<K, Row + 1>(tile, dw + (Row + 1) * in, to);
  hash_states<K, Row + 2>(tile, dw + (Row + 2) * in, to);
  hash_states<K, Row + 3>(tile, dw + (Row + 3) * in, to);
  add_group(turns[(Row / 4 + 1) % 2], sums);
}

template <int K>
void add_tiles(const Layer& layer, int64_t row0, int64_t row1, const float* dw, Histograms& sums) {
  Group turns[2] = {};
  const int64_t in = layer.in;
  const uint8_t* tile = layer.codes + row0 / 16 * layer.tile_cols() * 16 * K;
  for (int64_t row = row0; row < row1; row += 16, dw += 16 * in)
    for (int64_t col = 0; col < in; col += 16, tile += 16 * K) {
      add_rows<K, 0>(tile, dw + col, in, turns, sums);
      add_rows<K, 4>(tile, dw + col, in, turns, sums);
      add_rows<K, 8>(tile, dw + col, in, turns, sums);
      add_rows<K, 12>(tile, dw + col, in, turns, sums);
    }
  add_group(turns[1], sums);
}

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {

void trellis_adjoint_avx2_slots(Row& row, int k) {
  with_trellis_bits(k, [&]<int K> { row.adjoint = histogram_adjoint<K, add_tiles<K>>; });
}

}  // namespace rs
#endif
