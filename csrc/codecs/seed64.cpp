#include "seed64.h"

#include <cmath>
#include <limits>
#include <memory>

#include "../cpu/clones.h"
#include "../cpu/widths.h"

namespace rs {

SeedPattern::SeedPattern() {
  for (int start = 0; start < 256; ++start)
    for (int j = 0; j < kTreeSide; ++j)
      at[start][j] = static_cast<float>(
          add(1.0, mul(0.1, turn_sine(static_cast<uint64_t>(start + 17 * j) & 255, 256))));
}

const SeedPattern& SeedPattern::get() {
  static const SeedPattern table;
  return table;
}

namespace {

// p * scale of `n` words, a multiple of 8: seed_value lane by lane.
template <int L>
RS_INLINE void factors(const uint8_t* bytes, int64_t n, float scale, float* p) {
  constexpr int kLanes = L / 2;
  using Doubles = VectorOf<double, kLanes>;
  using Words = VectorOf<int64_t, kLanes>;
  // Whole numbers below 2^52 to float64: as the last bits of 2^52 + k.
  constexpr int64_t kBits52 = 0x4330000000000000, kQuarter = int64_t{1} << 30;
  constexpr double kUnit = 6.283185307179586 / 4294967296.0;
  for (; n > 0; n -= kLanes, bytes += sizeof(Words), p += kLanes) {
    VectorOf<uint64_t, kLanes> words;
    __builtin_memcpy(&words, bytes, sizeof words);

    Doubles r = ((Doubles)((words >> 32) | kBits52) - 0x1p52) * 0x1p-32;
    r = r < kLeastSeed ? kLeastSeed + Doubles{} : r;
    r = r > kLargestSeed ? kLargestSeed + Doubles{} : r;
    const Doubles g = (2.0 * r) / (1.0 + r * r);

    Words k = (Words)((words - kQuarter) & 0xFFFFFFFF);
    k = k > 2 * kQuarter ? 4 * kQuarter - k : k;
    const Words negative = k > kQuarter;
    k = negative ? 2 * kQuarter - k : k;
    const Words steep = k > kQuarter / 2;
    k = steep ? kQuarter - k : k;
    const Doubles x = ((Doubles)(k | kBits52) - 0x1p52) * kUnit, y = x * x;
    Doubles sum = steep ? kSineSeries[8] + Doubles{} : kCosineSeries[8] + Doubles{};
#pragma GCC unroll 8
    for (int i = 7; i >= 0; --i)
      sum = sum * y + (steep ? kSineSeries[i] + Doubles{} : kCosineSeries[i] + Doubles{});
    sum = sum * (steep ? x : 1.0 + Doubles{});
    const Doubles value = g * (negative ? -sum : sum);
    for (int lane = 0; lane < kLanes; ++lane) p[lane] = static_cast<float>(value[lane]) * scale;
  }
}

void seed_factors(const uint8_t* words, int64_t n, float scale, float* p) {
  const int64_t whole = n / 8 * 8;
  by_width([&]<int L>() RS_LAMBDA { factors<L>(words, whole, scale, p); });
  if (whole == n) return;
  uint8_t last[64] = {};
  float few[8];
  std::copy(words + 8 * whole, words + 8 * n, last);
  by_width([&]<int L>() RS_LAMBDA { factors<L>(last, 8, scale, few); });
  std::copy(few, few + (n - whole), p + whole);
}

// Rows of blocks of B: w[j] = p[j / B] * m[j mod B].
template <int B, int L>
RS_INLINE void fill_row(const float* p, int64_t n, const float* m, float* w) {
  int64_t t = 0;
  if constexpr (L > B) {  // more than one block a vector
    VectorOf<float, L> pattern;
    for (int lane = 0; lane < L; ++lane) pattern[lane] = m[lane % B];
    for (; t + L <= n; t += L)
#pragma GCC unroll 4
      for (int v = 0; v < B; ++v) {
        VectorOf<int32_t, L> of;
#pragma GCC unroll 16
        for (int lane = 0; lane < L; ++lane) of[lane] = (v * L + lane) / B;
        at<float, L>(w + t * B + v * L) = __builtin_shuffle(at<float, L>(p + t), of) * pattern;
      }
  }
  for (; t < n; ++t)
    for (int j = 0; j < B; ++j) w[t * B + j] = p[t] * m[j];
}

RS_CLONES void fill_wide_row(const float* p, int64_t n, int64_t side, const float* m, float* w) {
  for (int64_t t = 0; t < n; ++t)
    for (int64_t j = 0; j < side; ++j) w[t * side + j] = p[t] * m[j];
}

void decode_blocks(const Layer& layer, int64_t row0, int64_t row1, float* w) {
  const int64_t side = layer.tile.rows, n = layer.tile_cols();
  const SeedPattern& pattern = SeedPattern::get();
  std::vector<float> p(static_cast<size_t>(n));
  for (int64_t tr = row0 / side; tr < row1 / side; ++tr) {
    seed_factors(layer.codes + tr * n * 8, n, layer.params[0][0], p.data());
    for (int64_t i = 0; i < side; ++i, w += layer.in) {
      if (side > 8)
        fill_wide_row(p.data(), n, side, pattern.row(i), w);
      else
        by_width([&]<int L>() RS_LAMBDA {
          side == 4 ? fill_row<4, L>(p.data(), n, pattern.row(i), w)
                    : fill_row<8, L>(p.data(), n, pattern.row(i), w);
        });
    }
  }
}

void decode_trees(const Layer& layer, int64_t row0, int64_t row1, float* w) {
  const SeedPattern& pattern = SeedPattern::get();
  const float scale = layer.params[0][0];
  seed_blocks(layer, row0, row1, [&](float p, int64_t row, int64_t col, int64_t size) {
    const float factor = mul(p, scale);
    for (int64_t i = 0; i < size; ++i)
      fill_wide_row(&factor, 1, size, pattern.row(i), w + (row + i) * layer.in + col);
  });
}

void adjoint(const Layer& layer, int64_t row0, int64_t row1, const float* dw, float* const* grads) {
  if (!grads[0]) return;
  const SeedPattern& pattern = SeedPattern::get();
  double total = 0;  // as many terms as the range has weights
  seed_blocks(layer, row0, row1, [&](float p, int64_t row, int64_t col, int64_t size) {
    double sum = 0;
    for (int64_t i = 0; i < size; ++i)
      for (int64_t j = 0; j < size; ++j)
        sum += static_cast<double>(pattern.row(i)[j]) * dw[(row + i) * layer.in + col + j];
    total += p * sum;
  });
  grads[0][0] += static_cast<float>(total);
}

void check_tree(const Layer& layer, int64_t tile) {
  const uint8_t* tree = layer.codes + tile * layer.tile.bytes;
  const int64_t seeds = (layer.tile.bytes - kTreeBytes) / 8;
  int64_t leaves = 0, inner = 0;
  seed_leaves(tree, 0, 0, 0, leaves, [](int64_t, int64_t, int64_t, int64_t) {});
  for (int64_t bit = 0; bit < 8 * kTreeBytes; ++bit) inner += tree[bit >> 3] >> (bit & 7) & 1;
  if (leaves > seeds) throw std::invalid_argument("the tree has more leaves than seeds");
  // A tree with n inner nodes has 3n + 1 leaves; other bits belong to no node of it.
  if (leaves != 3 * inner + 1)
    throw std::invalid_argument("a split bit is set where its node does not exist");
  for (int64_t byte = kTreeBytes + 8 * leaves; byte < layer.tile.bytes; ++byte)
    if (tree[byte]) throw std::invalid_argument("unused seeds must be zero");
}

}  // namespace

std::vector<Term> seed64_terms(const Spec& spec, Shape) {
  spec.only({"block", "fit", "seeds", "bound"});
  const double block = spec.number("block", 8), seeds = spec.number("seeds", 64),
               bound = spec.number("bound", 0.5);
  const std::string fit = spec.word("fit", "closed");
  bool known = block == 0;
  for (int size = 4; size <= kTreeSide; size *= 2) known |= block == size;
  if (!known)
    throw std::invalid_argument(
        "seed64: block must be 0 (a quadtree) or a power of two from 4 to 256, got " +
        spec.word("block", ""));
  if (fit != "closed" && fit != "adam")
    throw std::invalid_argument("seed64: fit must be closed or adam, got " + fit);
  if (!(seeds >= 1 && seeds <= 4096 && seeds == std::floor(seeds)))
    throw std::invalid_argument("seed64: seeds must be a whole number from 1 to 4096, got " +
                                spec.word("seeds", ""));
  if (!(bound >= 0 && bound <= 1))
    throw std::invalid_argument("seed64: bound must be from 0 to 1, got " + spec.word("bound", ""));
  if (block != 0 && (seeds != 64 || bound != 0.5))
    throw std::invalid_argument("seed64: seeds and bound are settings of block=0");
  const auto side = static_cast<int64_t>(block);
  Term term;
  Row& row = term.row;
  row.name = "seed64";
  row.tile = side ? Tile{side, side, 8}
                  : Tile{kTreeSide, kTreeSide, kTreeBytes + 8 * static_cast<int64_t>(seeds)};
  row.params = {{"scale", Axis::shared, {1}}};
  row.adjoint = adjoint;
  row.encode = seed64_encode;
  row.encode_batch = side ? std::max<int64_t>(1, 4096 / (side * side)) : 1;
  if (side) {
    row.decode = decode_blocks;
    row.linear = seed64_linear;
    row.linear_max_m = 2 * side * side;  // then panels are about as fast
  } else {
    row.decode = decode_trees;
    row.linear = seed64_tree_linear;
    row.linear_max_m = std::numeric_limits<int64_t>::max();
    row.check = check_tree;
  }
  return {term};
}

}  // namespace rs
