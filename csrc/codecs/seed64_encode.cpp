// The encoder of seed64. A block is one number p times a known pattern m, so least squares is
// p = sum h w m / sum h m^2, and the error of any other p' is (p' - p)^2 sum h m^2 more.
#include <bit>
#include <cmath>
#include <queue>

#include "../cpu/clones.h"
#include "seed64.h"

namespace rs {
namespace {

// Importance-weighted sums over a block of weights held times `unit`: h, h w^2, h w m, h m^2.
struct Moments {
  double h = 0, ww = 0, wm = 0, mm = 0;
  double p() const { return mm > 0 ? wm / mm : 0; }
  double error() const { return mm > 0 ? std::max(0.0, ww - wm * wm / mm) : 0; }
};

constexpr int kLanes = 4;  // of float64; also the least side of a block

RS_CLONES void add_row(const float* w, const float* h, const float* m, double unit, int64_t n,
                       double (*sums)[kLanes]) {
  for (int64_t j = 0; j < n; j += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      const double x = w[j + lane] * unit, weight = h ? h[j + lane] : 1.0, y = m[j + lane];
      sums[0][lane] += weight;
      sums[1][lane] += weight * x * x;
      sums[2][lane] += weight * x * y;
      sums[3][lane] += weight * y * y;
    }
}

struct Target {
  const float* w;
  const float* importance;  // of the first column of w, or null
  int64_t stride;
  double unit;

  Moments block(int64_t row, int64_t col, int64_t size) const {
    const SeedPattern& pattern = SeedPattern::get();
    double sums[4][kLanes] = {};
    for (int64_t i = 0; i < size; ++i)
      add_row(w + (row + i) * stride + col, importance ? importance + col : nullptr, pattern.row(i),
              unit, size, sums);
    double total[4];
    for (int s = 0; s < 4; ++s) total[s] = (sums[s][0] + sums[s][1]) + (sums[s][2] + sums[s][3]);
    return {total[0], total[1], total[2], total[3]};
  }
};

uint32_t q32(double x) {
  return static_cast<uint32_t>(std::clamp(std::nearbyint(x * 4294967296.0), 0.0, 4294967295.0));
}

double value_of(uint64_t word) {
  return seed_value(static_cast<uint32_t>(word >> 32), static_cast<uint32_t>(word));
}

// The word whose g(r) sin(theta) is nearest to p: both factors near sqrt |p|, where neither is
// coarse and neither is flat.
uint64_t closed_form(double p) {
  const double size = std::min(std::abs(p), 1.0);
  if (size == 0) return 0;
  const uint32_t turn = q32(std::asin(std::sqrt(size)) / 6.283185307179586);
  const double sine = turn_sine(turn, uint64_t{1} << 32);
  const double g = sine > 0 ? std::min(size / sine, 1.0) : 0;
  const double r = g / (1 + std::sqrt(std::max(0.0, 1 - g * g)));
  return static_cast<uint64_t>(q32(r)) << 32 | (p < 0 ? 0u - turn : turn);
}

// The documents' fit: Adam on r and theta with r held to its range, and theta wrapped, after every
// step. The loss is their mean of squares over a block, in units of mean m^2: (g sin - p)^2 / 2.
uint64_t adam(double p) {
  constexpr int kSteps = 300;
  constexpr double kRate = 0.02, kBeta1 = 0.9, kBeta2 = 0.999, kEps = 1e-8;
  double r = 0.5, theta = p < 0 ? -0.5 : 0.5;  // radians
  double m[2] = {}, v[2] = {}, decay1 = 1, decay2 = 1;
  for (int step = 0; step < kSteps; ++step) {
    const double square = r * r, g = 2 * r / (1 + square), sine = std::sin(theta);
    const double miss = g * sine - p;
    const double slope[2] = {miss * sine * 2 * (1 - square) / ((1 + square) * (1 + square)),
                             miss * g * std::cos(theta)};
    decay1 *= kBeta1, decay2 *= kBeta2;
    double* x[2] = {&r, &theta};
    const double rate = kRate * (1 - static_cast<double>(step) / kSteps);
    for (int i = 0; i < 2; ++i) {
      m[i] = kBeta1 * m[i] + (1 - kBeta1) * slope[i];
      v[i] = kBeta2 * v[i] + (1 - kBeta2) * slope[i] * slope[i];
      *x[i] -= rate * (m[i] / (1 - decay1)) / (std::sqrt(v[i] / (1 - decay2)) + kEps);
    }
    r = std::clamp(r, kLeastSeed, kLargestSeed);
  }
  const double turns = theta / 6.283185307179586;
  return static_cast<uint64_t>(q32(r)) << 32 | q32(turns - std::floor(turns));
}

// Word of a block; `scale` in the unit of the moments.
uint64_t word_of(const Moments& moments, double scale, bool with_adam) {
  const double p = scale != 0 ? std::clamp(moments.p() / scale, -1.0, 1.0) : 0;
  const uint64_t closed = closed_form(p);
  if (!with_adam || p == 0) return closed;
  const uint64_t descended = adam(p);  // kept where it is no worse
  return std::abs(value_of(descended) - p) < std::abs(value_of(closed) - p) ? descended : closed;
}

void store(uint64_t word, uint8_t* bytes) {
  for (int i = 0; i < 8; ++i) bytes[i] = static_cast<uint8_t>(word >> 8 * i);
}

struct Node {
  int level;
  int64_t y, x;
  double gain;  // of splitting it
  bool operator<(const Node& other) const { return gain < other.gain; }
};

// All blocks of a tile at every size, and the greedy choice among its trees.
class Tree {
 public:
  Tree(const Target& target) {
    for (int level = 0; level <= kTreeLevels; ++level) {
      const int64_t across = int64_t{1} << level, size = kTreeSide >> level;
      for (int64_t y = 0; y < across; ++y)
        for (int64_t x = 0; x < across; ++x)
          nodes_[level].push_back(target.block(y * size, x * size, size));
    }
  }
  const Moments& at(int level, int64_t y, int64_t x) const {
    return nodes_[level][static_cast<size_t>((y << level) + x)];
  }

  // Sets the split bits: nodes whose mean squared error is above the bound are split, the largest
  // gain first, while there are seeds.
  void split(int64_t seeds, double bound, uint8_t* bits) const {
    const Moments& all = at(0, 0, 0);
    const double most = all.h > 0 ? bound * all.ww / all.h : 0;
    std::priority_queue<Node> open;
    const auto offer = [&](int level, int64_t y, int64_t x) {
      const Moments& own = at(level, y, x);
      if (level == kTreeLevels || !(own.error() > most * own.h)) return;
      double parts = 0;
      for (int child = 0; child < 4; ++child)
        parts += at(level + 1, 2 * y + child / 2, 2 * x + child % 2).error();
      open.push({level, y, x, own.error() - parts});
    };
    offer(0, 0, 0);
    for (int64_t leaves = 1; !open.empty() && leaves + 3 <= seeds; leaves += 3) {
      const Node node = open.top();
      open.pop();
      const int64_t bit =
          ((int64_t{1} << 2 * node.level) - 1) / 3 + (node.y << node.level) + node.x;
      bits[bit >> 3] = static_cast<uint8_t>(bits[bit >> 3] | 1 << (bit & 7));
      for (int child = 0; child < 4; ++child)
        offer(node.level + 1, 2 * node.y + child / 2, 2 * node.x + child % 2);
    }
  }

 private:
  std::vector<Moments> nodes_[kTreeLevels + 1];
};

}  // namespace

void seed64_encode(const Layer& layer, const float* w, const EncodeOptions& options, int64_t tile0,
                   int64_t tile1, uint8_t* codes, float* const*) {
  const bool with_adam = layer.spec->word("fit", "closed") == "adam";
  const double bound = layer.spec->number("bound", 0.5);
  const int64_t side = layer.tile.rows, bytes = layer.tile.bytes;
  // In units of the scale the moments are near one whatever the size of the weights.
  const double scale = layer.params[0][0], unit = scale != 0 ? 1 / scale : 1;
  for (int64_t t = tile0; t < tile1; ++t) {
    const int64_t row = t / layer.tile_cols() * side, col = t % layer.tile_cols() * side;
    const Target target{w + row * layer.in + col,
                        options.importance ? options.importance + col : nullptr, layer.in, unit};
    uint8_t* tile = codes + t * bytes;
    if (bytes == 8) {
      store(word_of(target.block(0, 0, side), scale * unit, with_adam), tile);
      continue;
    }
    const Tree tree(target);
    tree.split((bytes - kTreeBytes) / 8, bound, tile);
    int64_t leaf = 0;
    seed_leaves(tile, 0, 0, 0, leaf, [&](int64_t y, int64_t x, int64_t size, int64_t n) {
      const int level = std::countr_zero(static_cast<uint64_t>(kTreeSide / size));
      store(word_of(tree.at(level, y / size, x / size), scale * unit, with_adam),
            tile + kTreeBytes + 8 * n);
    });
  }
}

}  // namespace rs
