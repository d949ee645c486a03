// The trellis on AVX2, in 16-bit lanes of two registers: eight rows of the tile each, two
// neighbouring states of a row at each of four steps.
//
//   windows  byte shuffles bring 32 bits with both states into the lane of each row, shifts cut
//   them tables   of int16 as two planes of bytes, 16 entries a vpshufb; the indices of both
//   registers are
//            packed to bytes, so that one shuffle serves 32 states, and unpacked with their planes
//   sums     vpmaddwd against the same pair of activations in all lanes: 16 row sums, no reduction
#include "fast.h"

#if RS_FAST_X86
#include <array>

#include "parallel.h"
#include "trellis_integers.h"

namespace rs {
namespace {

// Where the windows of step j lie: ring bytes from start[j] + K * row on. A register half holds
// four rows, which 16 bytes contain up to k = 4; beyond, the last two rows have 16 bytes of their
// own.
template <int K>
struct Steps {
  static constexpr int kLoads = K <= 4 ? 1 : 2, kRowsPerLoad = 4 / kLoads;
  int start[4]{}, offset[4]{};  // in bytes, even, and the bits from there to the first state
  alignas(32) uint8_t shuffle[4][kLoads][32]{};

  constexpr Steps() {
    for (int j = 0; j < 4; ++j) {
      const int byte = 2 * j * K / 8;
      start[j] = byte & ~1;
      offset[j] = 2 * j * K % 8;
      for (int l = 0; l < kLoads; ++l)
        for (int i = 0; i < 32; ++i) {
          const int row = i % 16 / 4, q = byte - start[j] + K * (row % kRowsPerLoad) + 3 - i % 4;
          shuffle[j][l][i] = row / kRowsPerLoad == l && q < 16 ? static_cast<uint8_t>(q ^ 1) : 0x80;
        }
    }
  }
};
template <int K>
constexpr Steps<K> kSteps;

// The integer tables in planes of their low and high bytes, each 16 entries twice.
struct BytePlanes {
  alignas(32) uint8_t radius[2][4][32], cosine[2][32], sine[2][32];

  explicit BytePlanes(const TrellisIntegers& t) {
    for (int high = 0; high < 2; ++high)
      for (int i = 0; i < 32; ++i) {
        const auto byte = [&](int16_t value) { return static_cast<uint8_t>(value >> (8 * high)); };
        for (int s = 0; s < 4; ++s) radius[high][s][i] = byte(t.radius[16 * s + i % 16]);
        cosine[high][i] = byte(t.cosine[i % 16]);
        sine[high][i] = byte(t.sine[i % 16]);
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

RS_INLINE __m256i load(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }

// States of step J: rows 0 to 7 (Half 0) or 8 to 15 (Half 1).
template <int K, int J, int Half>
RS_INLINE __m256i step_states(const uint8_t* tile) {
  constexpr auto& steps = kSteps<K>;
  constexpr int kStart = steps.start[J] + 8 * K * Half, kOffset = steps.offset[J];
  __m256i w =
      _mm256_shuffle_epi8(_mm256_set_m128i(ring<K, kStart + 4 * K>(tile), ring<K, kStart>(tile)),
                          load(steps.shuffle[J][0]));
  if constexpr (K > 4)
    w = _mm256_or_si256(w, _mm256_shuffle_epi8(_mm256_set_m128i(ring<K, kStart + 6 * K>(tile),
                                                                ring<K, kStart + 2 * K>(tile)),
                                               load(steps.shuffle[J][1])));
  return _mm256_blend_epi16(_mm256_srli_epi32(w, 16 - kOffset), _mm256_slli_epi32(w, kOffset + K),
                            0xAA);
}

// One plane of radii by the low nibble of each byte index, its bit 4 and 5 in bit 7 of bit4 and
// bit5.
RS_INLINE __m256i radius_plane(const uint8_t (*slices)[32], __m256i index, __m256i bit4,
                               __m256i bit5) {
  const __m256i a = _mm256_blendv_epi8(_mm256_shuffle_epi8(load(slices[0]), index),
                                       _mm256_shuffle_epi8(load(slices[1]), index), bit4);
  const __m256i b = _mm256_blendv_epi8(_mm256_shuffle_epi8(load(slices[2]), index),
                                       _mm256_shuffle_epi8(load(slices[3]), index), bit4);
  return _mm256_blendv_epi8(a, b, bit5);
}

RS_INLINE __m256i negate_where(__m256i x, __m256i sign) {
  return _mm256_sign_epi16(x, _mm256_or_si256(sign, _mm256_set1_epi16(1)));
}

// u and v of the states of both halves.
RS_INLINE void points(const BytePlanes& t, const __m256i* states, __m256i* u, __m256i* v) {
  const __m256i m1 = _mm256_set1_epi16(static_cast<short>(kTrellisMultiplier >> 16));
  const __m256i m0 = _mm256_set1_epi16(static_cast<short>(kTrellisMultiplier & 0xFFFF));
  __m256i high[2], low[2];
  for (int i = 0; i < 2; ++i) {
    high[i] =
        _mm256_add_epi16(_mm256_mullo_epi16(states[i], m1), _mm256_mulhi_epu16(states[i], m0));
    low[i] = _mm256_mullo_epi16(states[i], m0);
  }
  // A phase comes with the sign above it, which vpshufb ignores.
  const __m256i phase =
      _mm256_packus_epi16(_mm256_srli_epi16(high[0], 11), _mm256_srli_epi16(high[1], 11));
  const __m256i six = _mm256_set1_epi16(63);
  const __m256i amp = _mm256_packus_epi16(_mm256_and_si256(_mm256_srli_epi16(high[0], 5), six),
                                          _mm256_and_si256(_mm256_srli_epi16(high[1], 5), six));
  const __m256i bit4 = _mm256_slli_epi16(amp, 3), bit5 = _mm256_slli_epi16(amp, 2);
  const __m256i r0 = radius_plane(t.radius[0], amp, bit4, bit5);
  const __m256i r1 = radius_plane(t.radius[1], amp, bit4, bit5);
  const __m256i c0 = _mm256_shuffle_epi8(load(t.cosine[0]), phase);
  const __m256i c1 = _mm256_shuffle_epi8(load(t.cosine[1]), phase);
  const __m256i s0 = _mm256_shuffle_epi8(load(t.sine[0]), phase);
  const __m256i s1 = _mm256_shuffle_epi8(load(t.sine[1]), phase);
  const __m256i r[2] = {_mm256_unpacklo_epi8(r0, r1), _mm256_unpackhi_epi8(r0, r1)};
  const __m256i c[2] = {_mm256_unpacklo_epi8(c0, c1), _mm256_unpackhi_epi8(c0, c1)};
  const __m256i s[2] = {_mm256_unpacklo_epi8(s0, s1), _mm256_unpackhi_epi8(s0, s1)};
  for (int i = 0; i < 2; ++i) {
    u[i] = negate_where(_mm256_mulhrs_epi16(c[i], r[i]), high[i]);
    v[i] = negate_where(_mm256_mulhrs_epi16(s[i], r[i]), low[i]);
  }
}

template <int K, int B, int J>
RS_INLINE void add_step(const uint8_t* tile, const int16_t* x, const BytePlanes& tables,
                        __m256i (*acc)[2]) {
  const __m256i states[2] = {step_states<K, J, 0>(tile), step_states<K, J, 1>(tile)};
  __m256i w[2][2];
  points(tables, states, w[0], w[1]);
  for (int b = 0; b < B; ++b)
    for (int part = 0; part < 2; ++part) {
      int pair;
      __builtin_memcpy(&pair, x + b * 32 + (2 * J + part) * 2, sizeof pair);
      for (int i = 0; i < 2; ++i)
        acc[b][i] =
            _mm256_add_epi32(acc[b][i], _mm256_madd_epi16(w[part][i], _mm256_set1_epi32(pair)));
    }
}

template <int K, int B>
RS_INLINE void add_tile(const uint8_t* tile, const int16_t* x, const BytePlanes& tables,
                        __m256i (*acc)[2]) {
  add_step<K, B, 0>(tile, x, tables, acc);
  add_step<K, B, 1>(tile, x, tables, acc);
  add_step<K, B, 2>(tile, x, tables, acc);
  add_step<K, B, 3>(tile, x, tables, acc);
}

template <int K, int B>
void product(const Layer& layer, const BytePlanes& tables, float unit, const TrellisActivations& x,
             int64_t m, int64_t tile_row0, int64_t tile_row1, float* y) {
  constexpr int kTileBytes = 16 * K;
  constexpr int kAhead = 2048;  // bytes of software prefetch
  const int64_t tiles = layer.tile_cols();
  for (int64_t tr = tile_row0; tr < tile_row1; ++tr) {
    const uint8_t* tile = layer.codes + tr * tiles * kTileBytes;
    const int16_t* values = x.values.get();
    const float* scale = x.scale.get();
    __m256 total[B][2];
    for (int b = 0; b < B; ++b) total[b][0] = total[b][1] = _mm256_setzero_ps();
    for (int64_t t = 0; t < tiles; t += 2, values += B * 32, scale += B) {
      __m256i acc[B][2];
      for (int b = 0; b < B; ++b) acc[b][0] = acc[b][1] = _mm256_setzero_si256();
      for (int at = 0; at < 2 * kTileBytes; at += 64) _mm_prefetch(tile + kAhead + at, _MM_HINT_T0);
      for (int64_t i = 0; i < 2 && t + i < tiles; ++i, tile += kTileBytes)
        add_tile<K, B>(tile, values + 16 * i, tables, acc);
      for (int b = 0; b < B; ++b)
        for (int i = 0; i < 2; ++i)
          total[b][i] =
              _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[b][i]), _mm256_set1_ps(scale[b]), total[b][i]);
    }
    for (int b = 0; b < B; ++b)
      for (int i = 0; i < 2; ++i)
        if (b < m)
          _mm256_storeu_ps(y + b * layer.out + tr * 16 + 8 * i,
                           _mm256_mul_ps(total[b][i], _mm256_set1_ps(unit)));
  }
}

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {
namespace {

template <int K>
void linear(const Layer& layer, const float* x, int64_t m, float* y) {
  const TrellisIntegers integers(layer);
  const BytePlanes tables(integers);
  const int64_t rows = layer.tile_rows(), grain = row_grain(rows, 16 * layer.in);
  for (int64_t b = 0; b < m; b += kMaxBatch) {
    const int64_t batch = std::min<int64_t>(kMaxBatch, m - b);
    const TrellisActivations pairs(x + b * layer.in, batch, layer.in, 2, 4);
    const auto kernel = pairs.batch == 1   ? product<K, 1>
                        : pairs.batch == 2 ? product<K, 2>
                        : pairs.batch == 3 ? product<K, 3>
                        : pairs.batch == 4 ? product<K, 4>
                        : pairs.batch == 6 ? product<K, 6>
                                           : product<K, 8>;
    parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
      kernel(layer, tables, integers.unit, pairs, batch, begin, end, y + b * layer.out);
    });
  }
}

template <int K>
void fill(Row& row) {
  row.linear = linear<K>;
  row.linear_max_m = 3 * kMaxBatch;  // then panels are about as fast
  row.linear_type = "int16 weights, 14-bit activations per 32 columns";
}

}  // namespace

void trellis_avx2_slots(Row& row, int k) {
  switch (k) {
    case 3:
      return fill<3>(row);
    case 4:
      return fill<4>(row);
    case 5:
      return fill<5>(row);
    case 6:
      return fill<6>(row);
    case 7:
      return fill<7>(row);
    case 8:
      return fill<8>(row);
  }
}

}  // namespace rs
#endif
