// Trellis tiles decoded to float32 on AVX2: the points of eight hashes are loaded one by one from a
// table of pairs, 8 KB in the first-level cache, and get their signs together. Lookups in
// registers would take more instructions: the 96 numbers behind the table fill twelve of sixteen.
#include "fast.h"

#if RS_FAST_X86
#include "trellis_integers.h"

namespace rs {
namespace {

// u, v of a point side by side; numbered as PolarTable.
struct PointTable {
  alignas(64) float at[1024][2];

  explicit PointTable(const PolarAxes& t) {
    for (int phase = 0; phase < kTrellisAngles; ++phase)
      for (int amp = 0; amp < kTrellisRadii; ++amp) {
        at[64 * phase + amp][0] = t.radius[amp] * t.cosine[phase];
        at[64 * phase + amp][1] = t.radius[amp] * t.sine[phase];
      }
  }
};

}  // namespace
}  // namespace rs

#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")

#include "trellis_rows_avx2.h"

namespace rs {
namespace {

RS_INLINE __m128 two_points(const PointTable& table, uint32_t first, uint32_t second) {
  const char* base = reinterpret_cast<const char*>(table.at);
  const __m128 low =
      _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(base + first)));
  return _mm_loadh_pi(low, reinterpret_cast<const __m64*>(base + second));
}

template <int K, int Row>
RS_INLINE void decode_row(const uint8_t* tile, const PointTable& table, float* w) {
  const __m256i hashes = hash_row<K, Row>(tile);
  alignas(32) uint32_t at[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(at), point_offsets(hashes));
  const __m256 low =
      _mm256_set_m128(two_points(table, at[4], at[5]), two_points(table, at[0], at[1]));
  const __m256 high =
      _mm256_set_m128(two_points(table, at[6], at[7]), two_points(table, at[2], at[3]));
  _mm256_storeu_ps(w, _mm256_xor_ps(low, row_signs<0>(hashes)));
  _mm256_storeu_ps(w + 8, _mm256_xor_ps(high, row_signs<1>(hashes)));
}

// Rows Row to Row + 3 of a row of tiles: sixteen at a power of two's distance would not stay in the
// first cache until the next tile fills their lines.
template <int K, int Row>
void decode_rows(const uint8_t* tile, int64_t in, const PointTable& table, float* w) {
  for (int64_t j = 0; j < in; j += 16, tile += 16 * K) {
    decode_row<K, Row>(tile, table, w + j);
    decode_row<K, Row + 1>(tile, table, w + in + j);
    decode_row<K, Row + 2>(tile, table, w + 2 * in + j);
    decode_row<K, Row + 3>(tile, table, w + 3 * in + j);
  }
}

template <int K>
void decode_tiles(const Layer& layer, const PointTable& table, int64_t row0, int64_t row1,
                  float* w) {
  const int64_t in = layer.in;
  const uint8_t* tiles = layer.codes + row0 * in / 16 * K;
  for (int64_t row = row0; row < row1; row += 16, tiles += in * K, w += 16 * in) {
    decode_rows<K, 0>(tiles, in, table, w);
    decode_rows<K, 4>(tiles, in, table, w + 4 * in);
    decode_rows<K, 8>(tiles, in, table, w + 8 * in);
    decode_rows<K, 12>(tiles, in, table, w + 12 * in);
  }
}

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {

void trellis_decode_avx2_slots(Row& row, int k) {
  with_trellis_bits(k, [&]<int K> {
    row.decode = [](const Layer& layer, int64_t row0, int64_t row1, float* w) {
      decode_tiles<K>(layer, PointTable(PolarAxes(layer)), row0, row1, w);
    };
  });
}

}  // namespace rs
#endif
