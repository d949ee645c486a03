// The trellis on AVX-512 (BW, VBMI, VBMI2, VNNI). Nothing is gathered: every table is in registers.
//
// linear   a 32-bit lane is a row of the tile and holds two of its eight states at each of four
// steps,
//          so that vpdpwssd against the same pair of activations in all lanes adds straight into 16
//          row sums.
//            even k   halves of a row: states 4 * half + step. A lane starts on a byte of the ring,
//            so
//                     byte permutes bring its words and a concat-shift by a constant makes each
//                     step.
//            odd k    neighbours: states 2 * step + half. Both fit in 32 bits, which one byte
//            permute
//                     brings and vpmultishiftqb cuts.
// decode   32 states at a time by byte permute and vpmultishiftqb, as two registers of 16 floats.
#include "fast.h"

#if RS_FAST_X86
#include <array>

#include "parallel.h"
#include "trellis_cuts.h"
#include "trellis_integers.h"

namespace rs {
namespace {

struct alignas(64) Words {
  uint16_t at[32];
};

// Even k: word w of lane i is the ring's 16 bits from 4 * k * i + 16 * w on.
template <int K>
constexpr std::array<Bytes, 3> lane_words() {
  std::array<Bytes, 3> words{};
  for (int w = 0; w < 3; ++w)
    for (int i = 0; i < 32; ++i)
      for (int high = 0; high < 2; ++high)
        words[w].at[2 * i + high] = ring_byte<K>(K / 2 * i + 2 * w + 1 - high);
  return words;
}

// Odd k: step j of a product.
template <int K>
constexpr std::array<Cut, 4> step_cuts() {
  std::array<Cut, 4> steps{};
  for (int j = 0; j < 4; ++j)
    for (int row = 0; row < 16; ++row) {
      const int n = 8 * row + 2 * j;
      fetch_pair<K>(steps[j].bytes, row, n);
      for (int half = 0; half < 2; ++half) cut_state<K>(steps[j].cut, 2 * row + half, row, n, half);
    }
  return steps;
}

// Decoding: states of rows 4 * g to 4 * g + 3. The even 16-bit lanes are 16 states of the first two
// rows, the odd ones those of the other two. `Split` rows share each 128 bits, as unpacking them
// with their partners into floats needs it; otherwise the first row comes first.
template <int K, bool Split>
constexpr std::array<Cut, 4> row_cuts() {
  std::array<Cut, 4> groups{};
  for (int g = 0; g < 4; ++g)
    for (int c = 0; c < 8; ++c) {  // 64 bits: a pair of states from each half
      const int n = 32 * g + (Split ? 8 * (c % 2) + c / 2 * 2 : 2 * c);
      for (int odd = 0; odd < 2; ++odd) {
        fetch_pair<K>(groups[g].bytes, 2 * c + odd, n + 16 * odd);
        for (int half = 0; half < 2; ++half)
          cut_state<K>(groups[g].cut, 4 * c + 2 * half + odd, 2 * c + odd, n, half);
      }
    }
  return groups;
}

template <int K>
constexpr auto kLaneWords = lane_words<K>();
template <int K>
constexpr auto kStepCuts = step_cuts<K>();
template <int K, bool Split>
constexpr auto kRowCuts = row_cuts<K, Split>();

constexpr Words next_word() {
  Words words{};
  for (int i = 0; i < 32; ++i) words.at[i] = static_cast<uint16_t>((i + 1) % 32);
  return words;
}
constexpr Words kNextWord = next_word();

}  // namespace
}  // namespace rs

#include "avx512.h"
#include "trellis_states_avx512.h"

namespace rs {
namespace {

// The states of the four steps of a product.
template <int K>
RS_INLINE void step_states(const uint8_t* tile, __m512i* s) {
  const TileBytes<K> bytes(tile);
  if constexpr (K % 2) {
    for (int j = 0; j < 4; ++j)
      s[j] = _mm512_multishift_epi64_epi8(load(kStepCuts<K>[j].cut.at),
                                          bytes.permute(kStepCuts<K>[j].bytes));
  } else {
    const auto& words = kLaneWords<K>;
    const __m512i a = K == 4 ? bytes.low : bytes.permute(words[0]);
    const __m512i b =
        K == 4 ? _mm512_permutexvar_epi16(load(kNextWord.at), a) : bytes.permute(words[1]);
    s[0] = a;
    s[1] = _mm512_shldi_epi16(a, b, K);
    s[2] = K == 8 ? b : _mm512_shldi_epi16(a, b, 2 * K % 16);
    s[3] = K == 4 ? _mm512_shldi_epi16(a, b, 12)
                  : _mm512_shldi_epi16(b, bytes.permute(words[2]), 3 * K % 16);
  }
}

struct IntegerTables {
  __m512i cosine, sine, radius0, radius1;

  RS_INLINE explicit IntegerTables(const TrellisIntegers& t)
      : cosine(load(t.cosine)),
        sine(load(t.sine)),
        radius0(load(t.radius)),
        radius1(load(t.radius + 32)) {}

  RS_INLINE void points(__m512i states, __m512i* u, __m512i* v) const {
    __m512i high, low;
    hash(states, &high, &low);
    // Bits 15 and 14..11 of the high half choose among 32 signed cosines; the sine's sign is bit 15
    // of the low half.
    const __m512i direction = _mm512_srli_epi16(high, 11);
    const __m512i turned = _mm512_ternarylogic_epi32(direction, _mm512_srli_epi16(low, 11),
                                                     _mm512_set1_epi16(16), 0xD8);
    const __m512i r = _mm512_permutex2var_epi16(radius0, _mm512_srli_epi16(high, 5), radius1);
    *u = _mm512_mulhrs_epi16(_mm512_permutexvar_epi16(direction, cosine), r);
    *v = _mm512_mulhrs_epi16(_mm512_permutexvar_epi16(turned, sine), r);
  }
};

// Adds a tile's products with B rows of x into acc[(2 * row + part) % chains].
template <int K, int B, int Chains>
RS_INLINE void add_tile(const uint8_t* tile, const int16_t* x, const IntegerTables& tables,
                        __m512i* acc) {
  __m512i s[4];
  step_states<K>(tile, s);
  for (int j = 0; j < 4; ++j) {
    __m512i w[2];
    tables.points(s[j], &w[0], &w[1]);
    for (int b = 0; b < B; ++b)
      for (int part = 0; part < 2; ++part) {
        int pair;
        __builtin_memcpy(&pair, x + b * 32 + (2 * j + part) * 2, sizeof pair);
        __m512i& sum = acc[b * Chains + part % Chains];
        sum = _mm512_dpwssd_epi32(sum, w[part], _mm512_set1_epi32(pair));
      }
  }
}

template <int K, int B>
void product(const Layer& layer, const TrellisIntegers& integers, const TrellisActivations& x,
             int64_t m, int64_t tile_row0, int64_t tile_row1, float* y) {
  constexpr int kTileBytes = 16 * K;
  constexpr int kAhead = 2048;             // bytes of software prefetch
  constexpr int kChains = B <= 2 ? 2 : 1;  // a single sum per row would wait for its own latency
  const IntegerTables tables(integers);
  const int64_t tiles = layer.tile_cols();
  for (int64_t tr = tile_row0; tr < tile_row1; ++tr) {
    const uint8_t* tile = layer.codes + tr * tiles * kTileBytes;
    const int16_t* values = x.values.get();
    const float* scale = x.scale.get();
    __m512 total[B];
    for (int b = 0; b < B; ++b) total[b] = _mm512_setzero_ps();
    for (int64_t t = 0; t < tiles; t += 2, values += B * 32, scale += B) {
      __m512i acc[B * kChains];
      for (int c = 0; c < B * kChains; ++c) acc[c] = _mm512_setzero_si512();
      for (int at = 0; at < 2 * kTileBytes; at += 64) _mm_prefetch(tile + kAhead + at, _MM_HINT_T0);
      add_tile<K, B, kChains>(tile, values, tables, acc);
      tile += kTileBytes;
      if (t + 1 < tiles) {
        add_tile<K, B, kChains>(tile, values + 16, tables, acc);
        tile += kTileBytes;
      }
      for (int b = 0; b < B; ++b) {
        __m512i sum = acc[b * kChains];
        if constexpr (kChains == 2) sum = _mm512_add_epi32(sum, acc[b * kChains + 1]);
        total[b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(scale[b]), total[b]);
      }
    }
    for (int b = 0; b < B; ++b)
      if (b < m)
        _mm512_storeu_ps(y + b * layer.out + tr * 16,
                         _mm512_mul_ps(total[b], _mm512_set1_ps(integers.unit)));
  }
}

struct FloatTables {
  __m512 cosine, sine;
  __m512i radius_low[2],
      radius_high[2];  // halves of the floats, so that one lookup is for 32 states

  RS_INLINE explicit FloatTables(const PolarAxes& t)
      : cosine(_mm512_loadu_ps(t.cosine)), sine(_mm512_loadu_ps(t.sine)) {
    alignas(64) uint16_t low[64], high[64];
    for (int i = 0; i < 64; ++i) {
      uint32_t bits;
      __builtin_memcpy(&bits, t.radius + i, sizeof bits);
      low[i] = static_cast<uint16_t>(bits);
      high[i] = static_cast<uint16_t>(bits >> 16);
    }
    for (int i = 0; i < 2; ++i)
      radius_low[i] = load(low + 32 * i), radius_high[i] = load(high + 32 * i);
  }

  // Points of the even (0) and odd (1) 16-bit lanes' states.
  RS_INLINE void points(__m512i states, __m512* u, __m512* v) const {
    constexpr __mmask32 kOdd = 0xAAAAAAAAu;
    const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
    __m512i high, low;
    hash(states, &high, &low);
    const __m512i amp = _mm512_srli_epi16(high, 5);
    const __m512i r0 = _mm512_permutex2var_epi16(radius_low[0], amp, radius_low[1]);
    const __m512i r1 = _mm512_permutex2var_epi16(radius_high[0], amp, radius_high[1]);
    const __m512i radius[2] = {_mm512_mask_blend_epi16(kOdd, r0, _mm512_slli_epi32(r1, 16)),
                               _mm512_mask_blend_epi16(kOdd, _mm512_srli_epi32(r0, 16), r1)};
    const __m512i h[2] = {_mm512_slli_epi32(high, 16), high};
    const __m512i l[2] = {_mm512_slli_epi32(low, 16), low};
    for (int i = 0; i < 2; ++i) {
      const __m512i phase = _mm512_srli_epi32(h[i], 27);
      const __m512 r = _mm512_castsi512_ps(radius[i]);
      u[i] = _mm512_mul_ps(_mm512_permutexvar_ps(phase, cosine), r);
      v[i] = _mm512_mul_ps(_mm512_permutexvar_ps(phase, sine), r);
      u[i] = flip(u[i], h[i], sign);
      v[i] = flip(v[i], l[i], sign);
    }
  }
  // x with its sign changed where bit 31 of h is set.
  static RS_INLINE __m512 flip(__m512 x, __m512i h, __m512i sign) {
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(x), h, sign, 0x78));
  }
};

template <int K, bool Split>
RS_INLINE __m512i row_states(const TileBytes<K>& bytes, int g) {
  return _mm512_multishift_epi64_epi8(load(kRowCuts<K, Split>[0].cut.at),
                                      bytes.permute(kRowCuts<K, Split>[g].bytes));
}

template <int K>
void decode_rows(const Layer& layer, const PolarAxes& table, int64_t row0, int64_t row1, float* w) {
  constexpr int kTileBytes = 16 * K;
  const FloatTables tables(table);
  const int64_t in = layer.in, tiles = layer.tile_cols();
  const uint8_t* tile = layer.codes + row0 / 16 * tiles * kTileBytes;
  for (int64_t row = row0; row < row1; row += 16, w += 16 * in)
    for (int64_t t = 0; t < tiles; ++t, tile += kTileBytes) {
      const TileBytes<K> bytes(tile);
      for (int g = 0; g < 4; ++g) {
        __m512 u[2], v[2];
        tables.points(row_states<K, true>(bytes, g), u, v);
        float* to = w + 4 * g * in + 16 * t;
        for (int i = 0; i < 2; ++i) {
          _mm512_storeu_ps(to + 2 * i * in, _mm512_unpacklo_ps(u[i], v[i]));
          _mm512_storeu_ps(to + (2 * i + 1) * in, _mm512_unpackhi_ps(u[i], v[i]));
        }
      }
    }
}

// Rows 4 * g + 2 * i and 4 * g + 2 * i + 1 of a tile, a half of w[i] each.
template <int K>
RS_INLINE void row_pairs(const FloatTables& tables, const TileBytes<K>& bytes, int g, __m512i* w) {
  __m512 u[2], v[2];
  tables.points(row_states<K, false>(bytes, g), u, v);
  for (int i = 0; i < 2; ++i)
    w[i] = _mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_srli_epi32(round_bf16(u[i]), 16),
                                   round_bf16(v[i]));
}

// Two tiles at a time: together their rows fill cache lines, of which sixteen at a power of two's
// distance would not stay in the first cache until the next tile.
template <int K>
void decode_rows(const Layer& layer, const PolarAxes& table, int64_t row0, int64_t row1,
                 uint16_t* w) {
  constexpr int kTileBytes = 16 * K;
  const FloatTables tables(table);
  const int64_t in = layer.in, tiles = layer.tile_cols();
  const uint8_t* tile = layer.codes + row0 / 16 * tiles * kTileBytes;
  for (int64_t row = row0; row < row1; row += 16, w += 16 * in) {
    int64_t t = 0;
    for (; t + 2 <= tiles; t += 2, tile += 2 * kTileBytes) {
      const TileBytes<K> left(tile), right(tile + kTileBytes);
      for (int g = 0; g < 4; ++g) {
        __m512i a[2], b[2];
        row_pairs<K>(tables, left, g, a);
        row_pairs<K>(tables, right, g, b);
        uint16_t* to = w + 4 * g * in + 16 * t;
        for (int i = 0; i < 2; ++i) {
          _mm512_storeu_si512(to + 2 * i * in, _mm512_shuffle_i64x2(a[i], b[i], 0x44));
          _mm512_storeu_si512(to + (2 * i + 1) * in, _mm512_shuffle_i64x2(a[i], b[i], 0xEE));
        }
      }
    }
    if (t < tiles) {
      const TileBytes<K> bytes(tile);
      for (int g = 0; g < 4; ++g) {
        __m512i a[2];
        row_pairs<K>(tables, bytes, g, a);
        uint16_t* to = w + 4 * g * in + 16 * t;
        for (int i = 0; i < 2; ++i) {
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 2 * i * in),
                              _mm512_castsi512_si256(a[i]));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (2 * i + 1) * in),
                              _mm512_extracti64x4_epi64(a[i], 1));
        }
      }
      tile += kTileBytes;
    }
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
  const int64_t rows = layer.tile_rows(), grain = row_grain(rows, 16 * layer.in);
  for (int64_t b = 0; b < m; b += kMaxBatch) {
    const int64_t batch = std::min<int64_t>(kMaxBatch, m - b);
    const TrellisActivations pairs(x + b * layer.in, batch, layer.in, K % 2 ? 2 : 8, K % 2 ? 4 : 2);
    const auto kernel = pairs.batch == 1   ? product<K, 1>
                        : pairs.batch == 2 ? product<K, 2>
                        : pairs.batch == 3 ? product<K, 3>
                        : pairs.batch == 4 ? product<K, 4>
                        : pairs.batch == 6 ? product<K, 6>
                                           : product<K, 8>;
    parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
      kernel(layer, integers, pairs, batch, begin, end, y + b * layer.out);
    });
  }
}

template <int K>
void decode(const Layer& layer, int64_t row0, int64_t row1, float* w) {
  decode_rows<K>(layer, PolarAxes(layer), row0, row1, w);
}

template <int K>
void decode_bf16(const Layer& layer, int64_t row0, int64_t row1, uint16_t* w) {
  PolarAxes table(layer);
  for (float& r : table.radius) r = quiet(r);
  for (float& c : table.cosine) c = quiet(c);
  for (float& s : table.sine) s = quiet(s);
  decode_rows<K>(layer, table, row0, row1, w);
}

template <int K>
void fill(Row& row) {
  row.decode = decode<K>;
  row.decode_bf16 = decode_bf16<K>;
  row.linear = linear<K>;
  row.linear_max_m = 2 * kMaxBatch;
  row.linear_type = "int16 weights, 14-bit activations per 32 columns";
}

}  // namespace

void trellis_avx512_slots(Row& row, int k) {
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
