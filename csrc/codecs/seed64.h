// One 64-bit seed per square block: a fixed pattern times a product of two functions.
//
//   tile      B x B (B = 4, 8, ..., 256), one little-endian 64-bit word
//     bit     63           32 31            0
//           |  r in Q32      |  theta in Q32 |     r = high / 2^32, held to [1e-6, 0.999];
//                                                  theta = low / 2^32 turns
//   g   = 2r / (1 + r^2)                  float64: (2 * r) / (1 + r * r), one rounding each
//   p   = fl32(g * sin(theta))            the product in float64 (sine by trig.h), then rounded
//   m   = fl32(1 + 0.1 * sin(2 pi ((31 i + 17 j) mod 256) / 256)), i and j inside the block
//   w   = fl32(fl32(p * scale) * m)
//   Only g * sin(theta) counts: one real degree of freedom per block, 64 bits or not.
//
//   block=0   tile 256 x 256, a quadtree of blocks of 256 to 4
//   byte      0            171                 171 + 8 seeds
//           | split bits | word 0 | word 1 ... |
//   Bit of the node of size 256/2^l, (y, x) counted in its size: (4^l - 1)/3 + y 2^l + x, for
//   l = 0 to 5; set where the node is four of half its size. Leaves take the words in the order
//   depth first, upper left, upper right, lower left, lower right; those that are not needed are
//   zero. In bytes of another origin leaves beyond the words share the last one.
//
// Params: scale (1), shared.
#pragma once

#include <algorithm>

#include "../codec.h"
#include "../hd.h"
#include "../trig.h"

namespace rs {

constexpr int64_t kTreeSide = 256, kTreeNodes = 1365, kTreeBytes = 171, kTreeLevels = 6;
constexpr double kLeastSeed = 1e-6, kLargestSeed = 0.999;

RS_HD uint64_t seed_word(const uint8_t* bytes) {
  uint64_t word = 0;
  for (int i = 7; i >= 0; --i) word = word << 8 | bytes[i];
  return word;
}

// g(r) sin(theta) of a word, before rounding.
RS_HD double seed_value(uint32_t high, uint32_t low) {
  double r = mul(static_cast<double>(high), 1.0 / 4294967296.0);
  r = r < kLeastSeed ? kLeastSeed : r;
  r = r > kLargestSeed ? kLargestSeed : r;
  return mul(mul(2.0, r) / add(1.0, mul(r, r)), turn_sine(low, uint64_t{1} << 32));
}

// The pattern m: entry `start` of it and what follows, in steps of 17.
struct SeedPattern {
  float at[256][kTreeSide];  // [31 i mod 256][j]
  SeedPattern();
  const float* row(int64_t i) const { return at[31 * i & 255]; }
  static const SeedPattern& get();
};

// Calls visit(row, col, size, leaf) for the leaves of a tree in their order.
template <class Visit>
void seed_leaves(const uint8_t* tree, int level, int64_t y, int64_t x, int64_t& leaf,
                 Visit&& visit) {
  const int64_t node = ((int64_t{1} << 2 * level) - 1) / 3 + (y << level) + x;
  if (level < kTreeLevels && tree[node >> 3] >> (node & 7) & 1) {
    for (int64_t child = 0; child < 4; ++child)
      seed_leaves(tree, level + 1, 2 * y + child / 2, 2 * x + child % 2, leaf, visit);
    return;
  }
  const int64_t size = kTreeSide >> level;
  visit(y * size, x * size, size, leaf++);
}

// The same for a layer of either kind: the blocks of the tiles of rows [row0, row1), with their
// factor p. visit(p, row, col, size), row relative to row0.
template <class Visit>
void seed_blocks(const Layer& layer, int64_t row0, int64_t row1, Visit&& visit) {
  const auto [side, cols, bytes] = layer.tile;
  const int64_t seeds = (bytes - kTreeBytes) / 8;
  for (int64_t tr = row0 / side; tr < row1 / side; ++tr)
    for (int64_t tc = 0; tc < layer.tile_cols(); ++tc) {
      const uint8_t* tile = layer.codes + (tr * layer.tile_cols() + tc) * bytes;
      const int64_t top = tr * side - row0, left = tc * cols;
      const auto block = [&](const uint8_t* word, int64_t y, int64_t x, int64_t size) {
        const uint64_t seed = seed_word(word);
        visit(static_cast<float>(
                  seed_value(static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(seed))),
              top + y, left + x, size);
      };
      if (bytes == 8) {
        block(tile, 0, 0, side);
        continue;
      }
      int64_t leaf = 0;
      seed_leaves(tile, 0, 0, 0, leaf, [&](int64_t y, int64_t x, int64_t size, int64_t n) {
        block(tile + kTreeBytes + 8 * std::min(n, seeds - 1), y, x, size);
      });
    }
}

// spec: seed64(block=8, fit=closed|adam, seeds=64, bound=0.5)
std::vector<Term> seed64_terms(const Spec& spec, Shape shape);

// Products of blocks and of trees.
void seed64_linear(const Layer& layer, const float* x, int64_t m, float* y);
void seed64_tree_linear(const Layer& layer, const float* x, int64_t m, float* y);

// The encoder of blocks, and of trees for block=0.
void seed64_encode(const Layer& layer, const float* w, const EncodeOptions& options, int64_t tile0,
                   int64_t tile1, uint8_t* codes, float* const* params);

}  // namespace rs
