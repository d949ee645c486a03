#include "hierarchical_xor.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <numeric>

#include "../cpu/clones.h"

namespace rs {
namespace {

using Values = std::array<float, 4>;

constexpr int kCanonical = 16384;
uint32_t canonical_base(int i) {  // diff = 0
  return static_cast<uint32_t>((i >> 10) << 12 | (i & 1023));
}

// Error of eight weights with each of n sets of four values, given as the middles and half lengths
// of two stretches: the distance to the nearest of a and b is ||w - (a+b)/2| - (b-a)/2|.
RS_CLONES void costs(const float* __restrict w, const float* __restrict h, const float* middle0,
                     const float* half0, const float* middle1, const float* half1, int n,
                     float* __restrict cost) {
  for (int c = 0; c < n; ++c) cost[c] = 0;
  for (int i = 0; i < kHierarchicalBlock; i += 2) {
    const float w0 = w[i], w1 = w[i + 1], h0 = h[i], h1 = h[i + 1];
    for (int c = 0; c < n; ++c) {
      const float a0 = std::abs(std::abs(w0 - middle0[c]) - half0[c]);
      const float b0 = std::abs(std::abs(w0 - middle1[c]) - half1[c]);
      const float a1 = std::abs(std::abs(w1 - middle0[c]) - half0[c]);
      const float b1 = std::abs(std::abs(w1 - middle1[c]) - half1[c]);
      const float miss0 = a0 < b0 ? a0 : b0, miss1 = a1 < b1 ? a1 : b1;
      cost[c] += h0 * (miss0 * miss0) + h1 * (miss1 * miss1);
    }
  }
}

// Costs as integers that order alike, with their index (below 256) in the low bits: the least of
// them is a reduction that vectorises.
RS_CLONES void to_keys(const float* cost, int n, int32_t* __restrict key) {
  for (int c = 0; c < n; ++c) {
    int32_t bits;
    std::memcpy(&bits, cost + c, sizeof bits);
    key[c] = (bits & ~255) | c;
  }
}
RS_CLONES int32_t least(const int32_t* key, int n) {
  int32_t best = std::numeric_limits<int32_t>::max();
  for (int c = 0; c < n; ++c) best = key[c] < best ? key[c] : best;
  return best;
}

// About Gaussian: a sum of uniform numbers, from integers alone.
float sample_weight(uint32_t& state) {
  int32_t sum = 0;
  for (int i = 0; i < 12; ++i) {
    state = state * 1664525u + 1013904223u;
    sum += static_cast<int32_t>(state >> 16);
  }
  return static_cast<float>(sum - 6 * 65535) * (1.0f / 65536);
}

}  // namespace

// Bases in a k-d tree of 2^n leaves, at most 256, of equal size, at most 256.
class XorSearch::Tree {
 public:
  // `values` by canonical index.
  Tree(const std::vector<Values>& values, std::vector<int> bases, int leaf, int visited)
      : order_(std::move(bases)), leaf_(leaf), visited_(visited) {
    split(values, 0, size());
    for (auto* quads : {&all_, &means_}) {
      const int n = quads == &all_ ? size() : leaves();
      for (std::vector<float>& part : *quads) part.resize(static_cast<size_t>(n));
    }
    for (int l = 0; l < leaves(); ++l) {
      Values mean{};
      for (int i = l * leaf; i < (l + 1) * leaf; ++i) {
        set(all_, i, values[order_[i]]);
        for (int k = 0; k < 4; ++k) mean[k] += values[order_[i]][k] / static_cast<float>(leaf);
      }
      set(means_, l, mean);
    }
  }

  // Canonical index of the base.
  int run(const float* w, const float* h) const {
    alignas(64) float cost[kMost];
    alignas(64) int32_t key[kMost];
    int32_t nodes[kMost];
    costs(w, h, means_[0].data(), means_[1].data(), means_[2].data(), means_[3].data(), leaves(),
          cost);
    to_keys(cost, leaves(), nodes);
    std::nth_element(nodes, nodes + visited_, nodes + leaves());
    int32_t best = std::numeric_limits<int32_t>::max();
    int at = order_[0];
    for (int visit = 0; visit < visited_; ++visit) {
      const int first = (nodes[visit] & 255) * leaf_;
      costs(w, h, &all_[0][first], &all_[1][first], &all_[2][first], &all_[3][first], leaf_, cost);
      to_keys(cost, leaf_, key);
      const int32_t found = least(key, leaf_);
      if (found >> 8 < best >> 8) best = found, at = order_[first + (found & 255)];
    }
    return at;
  }

 private:
  static constexpr int kMost = 256;  // leaves, and bases of a leaf

  using Quads = std::array<std::vector<float>, 4>;

  int size() const { return static_cast<int>(order_.size()); }
  int leaves() const { return size() / leaf_; }

  static void set(Quads& quads, int i, const Values& v) {
    for (int k = 0; k < 2; ++k) {
      quads[2 * k][i] = 0.5f * v[2 * k] + 0.5f * v[2 * k + 1];
      quads[2 * k + 1][i] = 0.5f * v[2 * k + 1] - 0.5f * v[2 * k];
    }
  }

  // Halves of the bases, at the median of the value that varies most, until they are leaves.
  void split(const std::vector<Values>& values, int begin, int end) {
    if (end - begin <= leaf_) return;
    int axis = 0;
    double most = -1;
    for (int k = 0; k < 4; ++k) {
      double sum = 0, squares = 0;
      for (int i = begin; i < end; ++i) {
        const double value = values[order_[i]][k];
        sum += value, squares += value * value;
      }
      const double spread = squares * (end - begin) - sum * sum;
      if (spread > most) most = spread, axis = k;
    }
    const int middle = begin + (end - begin) / 2;
    std::nth_element(order_.begin() + begin, order_.begin() + middle, order_.begin() + end,
                     [&](int a, int b) {
                       return std::pair(values[a][axis], a) < std::pair(values[b][axis], b);
                     });
    split(values, begin, middle);
    split(values, middle, end);
  }

  std::vector<int> order_;  // canonical indices by leaf
  int leaf_, visited_;
  Quads all_, means_;
};

XorSearch::XorSearch(const float* levels) {
  constexpr int kSamples = 16384, kKept = 1024;
  constexpr float kSizes[4] = {1.0f, 0.75f, 1.0f, 1.33f};  // real groups differ more than Gaussian
  constexpr float kOnes[kHierarchicalBlock] = {1, 1, 1, 1, 1, 1, 1, 1};
  std::vector<Values> values(kCanonical);
  for (int i = 0; i < kCanonical; ++i) {
    for (uint32_t d = 0; d < 4; ++d) {
      const float level = levels[XorMode::entry(canonical_base(i), d)];
      values[i][d] = std::isfinite(level) ? XorMode::factor(canonical_base(i), d) * level : 0.0f;
    }
    std::sort(values[i].begin(), values[i].end());
  }
  std::vector<int> bases(kCanonical), uses(kCanonical);
  std::iota(bases.begin(), bases.end(), 0);
  const Tree every(values, bases, 64, 16);
  uint32_t state = 1;
  for (int sample = 0; sample < kSamples; ++sample) {
    float w[kHierarchicalBlock];
    for (float& x : w) x = kSizes[sample % 4] * sample_weight(state);
    ++uses[every.run(w, kOnes)];
  }
  std::stable_sort(bases.begin(), bases.end(), [&](int a, int b) { return uses[a] > uses[b]; });
  bases.resize(kKept);
  tree_ = std::make_shared<const Tree>(values, bases, 32, 14);
}

uint32_t XorSearch::run(const float* w, const float* h) const {
  return canonical_base(tree_->run(w, h));
}

std::shared_ptr<const XorSearch> XorSearch::with(const float* levels) {
  using Key = std::array<float, kXorLevels>;
  Key key;
  std::memcpy(key.data(), levels, sizeof key);
  static std::mutex mutex;
  static Key last_key{};
  static std::shared_ptr<const XorSearch> last;
  const std::lock_guard lock(mutex);
  if (!last || std::memcmp(key.data(), last_key.data(), sizeof key) != 0) {
    last = std::make_shared<const XorSearch>(levels);
    last_key = key;
  }
  return last;
}

}  // namespace rs
