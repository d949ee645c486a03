// Products of seed64. The pattern is one wave over a block,
//     m(i,j) = 1 + sin(A i) cos(B j) / 10 + cos(A i) sin(B j) / 10,  A, B = 31, 17 of 256 turns,
// so a block sees three numbers of x: its sums with 1, cos(B j) and sin(B j). They are taken once
// for all rows of blocks; a block then costs three multiply-adds a row of x, whatever its size, and
// what a row of blocks adds up spreads to its outputs by 1, sin(A i) / 10 and cos(A i) / 10.
#include <algorithm>
#include <bit>
#include <vector>

#include "../cpu/dots.h"
#include "../cpu/integers.h"
#include "../cpu/parallel.h"
#include "../cpu/widths.h"
#include "seed64.h"

namespace rs {
namespace {

constexpr int kWaves = 3;

struct Waves {
  float down[2][kTreeSide], across[kWaves][kTreeSide];
  Waves() {
    for (uint64_t i = 0; i < kTreeSide; ++i) {
      down[0][i] = static_cast<float>(0.1 * turn_sine(31 * i, 256));
      down[1][i] = static_cast<float>(0.1 * turn_cosine(31 * i, 256));
      across[0][i] = 1.0f;
      across[1][i] = static_cast<float>(turn_cosine(17 * i, 256));
      across[2][i] = static_cast<float>(turn_sine(17 * i, 256));
    }
  }
  static const Waves& get() {
    static const Waves waves;
    return waves;
  }
};

// y[i] += what three sums, `stride` apart, say about row i of `size`.
RS_CLONES void spread(const Waves& waves, const float* sums, int64_t stride, int64_t size,
                      float* y) {
  const float one = sums[0], sine = sums[stride], cosine = sums[2 * stride];
  for (int64_t i = 0; i < size; ++i)
    y[i] += one + sine * waves.down[0][i] + cosine * waves.down[1][i];
}

// p * scale of `n` words, a multiple of 16, in float32: each within 5e-7 of itself.
template <int L>
RS_INLINE void factors(const uint8_t* bytes, int64_t n, float scale, float* p) {
  using Floats = VectorOf<float, L>;
  using Ints = VectorOf<int32_t, L>;
  using Words = VectorOf<uint32_t, L>;
  constexpr float kUnit = 6.283185307179586 / 4294967296.0;
  Ints even;
  for (int lane = 0; lane < L; ++lane) even[lane] = 2 * lane;
  for (; n > 0; n -= L, bytes += 8 * L, p += L) {
    Words first, second;
    __builtin_memcpy(&first, bytes, sizeof first);
    __builtin_memcpy(&second, bytes + sizeof first, sizeof second);
    const Words low = __builtin_shuffle(first, second, even),
                high = __builtin_shuffle(first, second, even + 1);

    Floats r = __builtin_convertvector((Ints)(high >> 16), Floats) * 0x1p-16f +
               __builtin_convertvector((Ints)(high & 0xFFFF), Floats) * 0x1p-32f;
    r = r < static_cast<float>(kLeastSeed) ? static_cast<float>(kLeastSeed) + Floats{} : r;
    r = r > static_cast<float>(kLargestSeed) ? static_cast<float>(kLargestSeed) + Floats{} : r;

    // The sine of up to a quarter turn either way: beyond, of what is left to half a turn.
    const Ints beyond = (Ints)(low + (1u << 30)) < 0;
    const Ints turn = beyond ? (Ints)((1u << 31) - low) : (Ints)low;
    const Floats x = __builtin_convertvector(turn, Floats) * kUnit, y = x * x;
    Floats sum = static_cast<float>(kSineSeries[5]) + Floats{};
#pragma GCC unroll 8
    for (int i = 4; i >= 0; --i) sum = sum * y + static_cast<float>(kSineSeries[i]);
    const Floats value = (r + r) / (1.0f + r * r) * (sum * x) * scale;
    __builtin_memcpy(p, &value, sizeof value);
  }
}

void product_factors(const uint8_t* words, int64_t n, float scale, float* p) {
  constexpr int64_t kFew = 16;
  const int64_t whole = n / kFew * kFew;
  by_width([&]<int L>() RS_LAMBDA { factors<L>(words, whole, scale, p); });
  if (whole == n) return;
  uint8_t last[8 * kFew] = {};
  float few[kFew];
  std::copy(words + 8 * whole, words + 8 * n, last);
  by_width([&]<int L>() RS_LAMBDA { factors<L>(last, kFew, scale, few); });
  std::copy(few, few + (n - whole), p + whole);
}

// The nodes of the trees side by side over x, size by size from 256 to 4: node x of level l is
// (tiles << l) - tiles + x. Three sums of each of m rows of x.
struct TreeSums {
  int64_t tiles, m;
  Lines<float> at;  // [node][wave][row]

  TreeSums(const float* x, int64_t m, int64_t in)
      : tiles(in / kTreeSide), m(m), at(tiles * ((2 << kTreeLevels) - 1) * kWaves * m) {
    parallel_for(tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) fill(t, x, in);
    });
  }
  void fill(int64_t tile, const float* x, int64_t in) const {
    constexpr int64_t kLeaves = 1 << kTreeLevels, kLeast = kTreeSide / kLeaves;
    const Waves& waves = Waves::get();
    for (int64_t node = tile * kLeaves; node < (tile + 1) * kLeaves; ++node)
      for (int k = 0; k < kWaves; ++k)
        for (int64_t b = 0; b < m; ++b) {
          const float *from = x + b * in + node * kLeast, *wave = waves.across[k];
          float sum = 0;
          for (int64_t j = 0; j < kLeast; ++j) sum += wave[j] * from[j];
          of(kTreeLevels, node)[k * m + b] = sum;
        }
    // A node is its left half and its right half, whose wave starts where the left one's ends.
    for (int level = kTreeLevels - 1; level >= 0; --level) {
      const int64_t half = kTreeSide >> (level + 1);
      const float cosine = waves.across[1][half], sine = waves.across[2][half];
      for (int64_t node = tile << level; node < (tile + 1) << level; ++node) {
        const float *left = of(level + 1, 2 * node), *right = of(level + 1, 2 * node + 1);
        float* sums = of(level, node);
        for (int64_t b = 0; b < m; ++b) {
          const float c = right[m + b], s = right[2 * m + b];
          sums[b] = left[b] + right[b];
          sums[m + b] = left[m + b] + (cosine * c - sine * s);
          sums[2 * m + b] = left[2 * m + b] + (sine * c + cosine * s);
        }
      }
    }
  }
  float* of(int level, int64_t node) const {
    return at.get() + ((tiles << level) - tiles + node) * kWaves * m;
  }
};

RS_CLONES void add_product(const float* from, float factor, int64_t n, float* sums) {
  for (int64_t i = 0; i < n; ++i) sums[i] += factor * from[i];
}

}  // namespace

void seed64_linear(const Layer& layer, const float* x, int64_t m, float* y) {
  constexpr int64_t kTogether = 4;  // rows of blocks
  const int64_t side = layer.tile.rows, n = layer.tile_cols(), sums = kWaves * m;
  const Waves& waves = Waves::get();
  Lines<float> seen(sums * n);  // [row][wave][block]
  parallel_for(sums, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      dots(x + i / kWaves * layer.in, n, waves.across[i % kWaves], 1, side, &seen[i * n], n);
  });
  parallel_for(layer.tile_rows(), kTogether, [&](int64_t begin, int64_t end) {
    std::vector<float> p(static_cast<size_t>(kTogether * n));
    std::vector<float> met(static_cast<size_t>(kTogether * sums));
    for (int64_t r = begin; r < end; r += kTogether) {
      const int64_t rows = std::min(kTogether, end - r);
      product_factors(layer.codes + r * n * 8, rows * n, layer.params[0][0], p.data());
      dots(seen.get(), sums, p.data(), rows, n, met.data(), sums);
      for (int64_t b = 0; b < m; ++b) {
        float* to = y + b * layer.out + r * side;
        std::fill_n(to, rows * side, 0.0f);
        for (int64_t i = 0; i < rows; ++i)
          spread(waves, met.data() + i * sums + b * kWaves, 1, side, to + i * side);
      }
    }
  });
}

void seed64_tree_linear(const Layer& layer, const float* x, int64_t m, float* y) {
  constexpr int64_t kRows = 64;  // of x at a time
  if (m > kRows) {
    seed64_tree_linear(layer, x, kRows, y);
    return seed64_tree_linear(layer, x + kRows * layer.in, m - kRows, y + kRows * layer.out);
  }
  const int64_t n = layer.tile_cols(), seeds = (layer.tile.bytes - kTreeBytes) / 8;
  const Waves& waves = Waves::get();
  const TreeSums seen(x, m, layer.in);
  parallel_for(layer.tile_rows(), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> p(static_cast<size_t>(seeds));
    // Of the rows of nodes, size by size: row y of level l is (1 << l) - 1 + y.
    std::vector<float> met(static_cast<size_t>(((2 << kTreeLevels) - 1) * kWaves * m));
    const auto met_by = [&](int level, int64_t row) {
      return met.data() + ((1 << level) - 1 + row) * kWaves * m;
    };
    for (int64_t r = begin; r < end; ++r) {
      std::fill(met.begin(), met.end(), 0.0f);
      for (int64_t t = 0; t < n; ++t) {
        const uint8_t* tree = layer.codes + (r * n + t) * layer.tile.bytes;
        product_factors(tree + kTreeBytes, seeds, layer.params[0][0], p.data());
        int64_t leaf = 0;
        seed_leaves(tree, 0, 0, 0, leaf, [&](int64_t row, int64_t col, int64_t size, int64_t at) {
          const int level = std::countr_zero(static_cast<uint64_t>(kTreeSide / size));
          add_product(seen.of(level, (t << level) + col / size),
                      p[static_cast<size_t>(std::min(at, seeds - 1))], kWaves * m,
                      met_by(level, row / size));
        });
      }
      for (int64_t b = 0; b < m; ++b) {
        float* to = y + b * layer.out + r * kTreeSide;
        std::fill_n(to, kTreeSide, 0.0f);
        for (int level = 0; level <= kTreeLevels; ++level)
          for (int64_t row = 0; row < 1 << level; ++row) {
            const int64_t size = kTreeSide >> level;
            spread(waves, met_by(level, row) + b, m, size, to + row * size);
          }
      }
    }
  });
}

}  // namespace rs
