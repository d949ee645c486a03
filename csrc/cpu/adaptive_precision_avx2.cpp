// adaptive_precision on AVX2, each tile from where it lies when what follows may be read too, else
// from a copy.
//
//   decode   half a group at a time, by one byte shuffle and one shift by lane
//   linear   a group's codes as int16: the two bytes that hold each, times a power of two, shifted
//            down; with the levels 2 code - top a group's product is
//            2 / top scale sum(code x) - scale sum(x)
#include "adaptive_precision_fast.h"

#if RS_FAST_X86
#include <vector>

#include "lanes.h"

namespace rs {
namespace {

constexpr AdaptiveUnpack kUnpack(8);

struct AdaptiveWords {
  struct alignas(128) Kind {
    alignas(32) uint8_t bytes[32];
    alignas(32) uint16_t up[16];
    int32_t down, size;
  };
  Kind kind[4]{};  // by the two bits of the map
  constexpr AdaptiveWords() {
    for (int i = 0; i < 4; ++i) {
      const int bits = kAdaptiveBits[kAdaptiveClass[i]];
      kind[i].down = 16 - bits;
      kind[i].size = 2 * bits;
      for (int j = 0; j < 16; ++j) {
        const int at = bits * (j % 8);
        kind[i].bytes[2 * j] = static_cast<uint8_t>(at / 8);
        kind[i].bytes[2 * j + 1] = static_cast<uint8_t>(at / 8 + 1);
        kind[i].up[j] = static_cast<uint16_t>(1 << (16 - bits - at % 8));
      }
    }
  }
};
constexpr AdaptiveWords kWords;

// Bytes of four groups, by their byte of the map.
struct FourSizes {
  uint8_t at[256]{};
  constexpr FourSizes() {
    for (int map = 0; map < 256; ++map)
      for (int g = 0; g < 4; ++g)
        at[map] = static_cast<uint8_t>(at[map] + kWords.kind[map >> (2 * g) & 3].size);
  }
};
constexpr FourSizes kFourSizes;

// Activations of groups, and their sums.
//   values[(group * batch + row) * 16 + column], sums[group * kMaxBatch + row]
struct GroupActivations {
  int batch;
  Lines<int16_t> values;
  Lines<float> sums;
  float unit[kMaxBatch];

  GroupActivations(const float* x, int64_t m, int64_t in)
      : batch(static_cast<int>(std::bit_ceil(static_cast<uint64_t>(m)))),
        values(in * batch),
        sums(in / kAdaptiveGroup * kMaxBatch) {
    for (int64_t b = 0; b < m; ++b) {
      const Quantum quantum(x + b * in, in, 32767);
      unit[b] = quantum.unit;
      for (int64_t g = 0; g < in / kAdaptiveGroup; ++g) {
        int16_t* to = values.get() + (g * batch + b) * kAdaptiveGroup;
        int32_t sum = 0;
        for (int j = 0; j < kAdaptiveGroup; ++j) {
          to[j] = quantum(x[b * in + g * kAdaptiveGroup + j]);
          sum += to[j];
        }
        sums[g * kMaxBatch + b] = static_cast<float>(sum);
      }
    }
  }
};

constexpr int64_t kMore = 16;  // bytes behind a tile's that may be read with them

}  // namespace
}  // namespace rs

#include "lanes_avx2.h"

namespace rs {
namespace {

// Tile t, or its copy where what follows it is not there.
RS_INLINE const uint8_t* readable(const Layer& layer, int64_t t, uint8_t* copy) {
  const int64_t bytes = layer.tile.bytes, tiles = layer.tile_rows() * layer.tile_cols();
  const uint8_t* tile = layer.codes + t * bytes;
  if ((tiles - 1 - t) * bytes >= kMore) return tile;
  __builtin_memcpy(copy, tile, static_cast<size_t>(bytes));
  return copy;
}

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

void decode_tiles(const Layer& layer, int64_t first, int64_t last, uint8_t* copy, float* w) {
  for (int64_t t = first; t < last; ++t, w += layer.tile.cols)
    decode_tile(readable(layer, t, copy), layer.tile.cols / kAdaptiveGroup, layer.tile.bytes,
                layer.params[0] + t * 3, w);
}

// By the two bits of the map, and zero for groups that would end past the tile.
struct ClassFactors {
  alignas(16) float code[4], one[4], none[4]{};

  RS_INLINE void load(const float* scales) {
    const __m128 scale = _mm_setr_ps(scales[0], scales[1], scales[2], scales[2]);
    const __m128 top =
        _mm_setr_ps(kAdaptiveTop[0], kAdaptiveTop[1], kAdaptiveTop[2], kAdaptiveTop[2]);
    const __m128 unit =
        _mm_setr_ps(kAdaptiveUnit[0], kAdaptiveUnit[1], kAdaptiveUnit[2], kAdaptiveUnit[2]);
    const __m128 half = _mm_mul_ps(scale, unit);
    _mm_store_ps(code, _mm_add_ps(half, half));
    _mm_store_ps(one, _mm_mul_ps(half, top));
  }
};

template <int B>
void product(const Layer& layer, const GroupActivations& x, int64_t m, uint8_t* copy, float* y,
             int64_t row0, int64_t row1) {
  constexpr int kSums = B == 1 ? 2 : 1;  // independent, so that additions need not wait
  const int64_t bytes = layer.tile.bytes, n = layer.tile_cols();
  const int64_t groups = layer.tile.cols / kAdaptiveGroup;
  ClassFactors factors;
  for (int64_t row = row0; row < row1; ++row) {
    const int16_t* values = x.values.get();
    const float* sums = x.sums.get();
    prefetch_tiles(layer, (row + 1) * n, (row + 2) * n);
    __m256 total[kSums][B], rest = _mm256_setzero_ps();
    for (auto& of : total)
      for (__m256& sum : of) sum = _mm256_setzero_ps();
    for (int64_t t = row * n; t < (row + 1) * n; ++t) {
      const uint8_t* tile = readable(layer, t, copy);
      factors.load(layer.params[0] + t * 3);
      int64_t at = (groups + 3) / 4;
      const auto add = [&](int i, unsigned stored, bool surely) RS_LAMBDA {
        const auto& kind = kWords.kind[stored];
        const bool inside = surely || at + kind.size <= bytes;
        const uint8_t* from = tile + (inside ? at : 0);
        const int64_t next = kind.size / 2;
        const __m256i halves = _mm256_inserti128_si256(
            _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))),
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + next)), 1);
        const __m256i pairs = _mm256_shuffle_epi8(
            halves, _mm256_load_si256(reinterpret_cast<const __m256i*>(kind.bytes)));
        const __m256i code = _mm256_srl_epi16(
            _mm256_mullo_epi16(pairs, _mm256_load_si256(reinterpret_cast<const __m256i*>(kind.up))),
            _mm_cvtsi32_si128(kind.down));
        const __m256 scale = _mm256_broadcast_ss((inside ? factors.code : factors.none) + stored);
        const __m256 offset = _mm256_broadcast_ss((inside ? factors.one : factors.none) + stored);
        for (int b = 0; b < B; ++b) {
          const __m256i v =
              _mm256_load_si256(reinterpret_cast<const __m256i*>(values + b * kAdaptiveGroup));
          total[i][b] =
              _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_madd_epi16(code, v)), scale, total[i][b]);
        }
        rest = _mm256_fmadd_ps(_mm256_load_ps(sums), offset, rest);
        values += B * kAdaptiveGroup;
        sums += kMaxBatch;
        at += kind.size;
      };
      int64_t g = 0;
      for (; g + 4 <= groups; g += 4) {
        const unsigned map = tile[g / 4];
        if (at + kFourSizes.at[map] > bytes) break;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) add(i % kSums, map >> (2 * i) & 3, true);
      }
      for (; g < groups; ++g) add(0, tile[g / 4] >> (2 * (g % 4)) & 3, false);
    }
    alignas(32) float offsets[kMaxBatch];
    _mm256_store_ps(offsets, rest);
    for (int b = 0; b < B; ++b) {
      for (int i = 1; i < kSums; ++i) total[0][b] = _mm256_add_ps(total[0][b], total[i][b]);
      if (b < m) y[b * layer.out + row] = (sum_lanes(total[0][b]) - offsets[b]) * x.unit[b];
    }
  }
}

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {
namespace {

std::vector<uint8_t> copy_of(const Layer& layer) {
  return std::vector<uint8_t>(static_cast<size_t>(layer.tile.bytes + kMore));
}

void decode(const Layer& layer, int64_t row0, int64_t row1, float* w) {
  const int64_t n = layer.tile_cols();
  decode_tiles(layer, row0 * n, row1 * n, copy_of(layer).data(), w);
}

void linear(const Layer& layer, const float* x, int64_t m, float* y) {
  const int64_t grain = row_grain(layer.out, layer.in);
  const GroupActivations values(x, m, layer.in);
  const auto kernel = values.batch == 1   ? product<1>
                      : values.batch == 2 ? product<2>
                      : values.batch == 4 ? product<4>
                                          : product<8>;
  parallel_for(layer.out, grain, [&](int64_t begin, int64_t end) {
    kernel(layer, values, m, copy_of(layer).data(), y, begin, end);
  });
}

}  // namespace

void adaptive_precision_avx2_slots(Row& row) {
  row.decode = decode;
  row.linear = linear;
  row.linear_max_m = kMaxBatch;
  row.linear_type = "integer codes, 16-bit activations per row";
}

}  // namespace rs
#endif
