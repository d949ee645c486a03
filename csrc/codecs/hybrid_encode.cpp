// The encoder of hybrid. The waves are orthonormal, so the largest terms are the best ones; with
// column weights they no longer are, and projected gradient steps move them (iterative hard
// thresholding, Blumensath and Davies, 2008).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "../cpu/clones.h"
#include "../cpu/widths.h"
#include "hybrid.h"

namespace rs {
namespace {

constexpr int64_t kLanes = 16;

// c = a b, all n x n, n a multiple of 8.
template <int L>
RS_INLINE void product(const float* a, const float* b, int64_t n, float* c) {
  for (int64_t i = 0; i < n; i += 8)
    for (int64_t j = 0; j < n; j += L) {
      VectorOf<float, L> sum[8] = {};
      for (int64_t k = 0; k < n; ++k) {
        VectorOf<float, L> row = {};
        if (j + L <= n)
          row = at<float, L>(b + k * n + j);
        else
          __builtin_memcpy(&row, b + k * n + j, std::min(L, 8) * sizeof(float));
#pragma GCC unroll 8
        for (int r = 0; r < 8; ++r) sum[r] += a[(i + r) * n + k] * row;
      }
      const int64_t real = std::min<int64_t>(L, n - j);
      for (int r = 0; r < 8; ++r)
        __builtin_memcpy(c + (i + r) * n + j, &sum[r], static_cast<size_t>(real) * sizeof(float));
    }
}
void product(const float* a, const float* b, int64_t n, float* c) {
  by_width([&]<int L>() RS_LAMBDA { product<L>(a, b, n, c); });
}

// sums[k] = sum of b[k] * w over the block, w already weighted; 16 partial sums each.
RS_CLONES void correlate(const float* b, const float* w, int64_t count, double* sums) {
  for (int k = 0; k < kSmooth; ++k) {
    double total = 0;
    for (int64_t first = 0; first < count; first += 64) {
      float lanes[kLanes] = {};
      for (int64_t i = 0; i < 64; i += kLanes)
        for (int64_t lane = 0; lane < kLanes; ++lane)
          lanes[lane] += b[k * count + first + i + lane] * w[first + i + lane];
      for (float lane : lanes) total += lane;
    }
    sums[k] = total;
  }
}

// Solves the 8 x 8 positive definite system in place, by Cholesky; a direction that is (nearly)
// none gets 0.
void solve(double (*a)[kSmooth], double* x) {
  double diagonal[kSmooth];
  for (int i = 0; i < kSmooth; ++i) {
    const double whole = a[i][i];
    for (int j = 0; j <= i; ++j) {
      double sum = a[i][j];
      for (int k = 0; k < j; ++k) sum -= a[i][k] * a[j][k];
      if (i != j)
        a[i][j] = diagonal[j] > 0 ? sum / diagonal[j] : 0;
      else
        diagonal[i] = sum > 1e-9 * whole ? std::sqrt(sum) : 0;
    }
  }
  for (int i = 0; i < kSmooth; ++i) {
    for (int k = 0; k < i; ++k) x[i] -= a[i][k] * x[k];
    x[i] = diagonal[i] > 0 ? x[i] / diagonal[i] : 0;
  }
  for (int i = kSmooth - 1; i >= 0; --i) {
    for (int k = i + 1; k < kSmooth; ++k) x[i] -= a[k][i] * x[k];
    x[i] = diagonal[i] > 0 ? x[i] / diagonal[i] : 0;
  }
}

// Everything that does not depend on the block, and room for one.
class Encoder {
 public:
  Encoder(int64_t side, int64_t terms)
      : tables_(HybridTables::get(side)), side_(side), count_(side * side), terms_(terms) {
    for (auto* v : {&target_, &rest_, &spectrum_, &kept_, &work_, &turned_})
      v->resize(static_cast<size_t>(count_));
    g_.resize(static_cast<size_t>(side * hybrid_width(side)));
    position_.resize(static_cast<size_t>(terms));
    value_.resize(static_cast<size_t>(terms));
    order_.resize(static_cast<size_t>(count_));
    for (int64_t u = 0; u < side; ++u)
      for (int64_t i = 0; i < side; ++i) turned_[i * side + u] = tables_.wave(u)[i];
    // gram_[j]: products of the smooth functions summed down column j.
    gram_.resize(static_cast<size_t>(side));
    for (int64_t j = 0; j < side; ++j)
      for (int a = 0; a < kSmooth; ++a)
        for (int b = 0; b < kSmooth; ++b) {
          double sum = 0;
          for (int64_t i = 0; i < side; ++i)
            sum += static_cast<double>(smooth(a)[i * side + j]) * smooth(b)[i * side + j];
          gram_[j].at[a][b] = sum;
        }
  }

  void run(const float* w, int64_t stride, const float* importance, uint8_t* bytes) {
    for (int64_t i = 0; i < side_; ++i)
      std::memcpy(target_.data() + i * side_, w + i * stride,
                  static_cast<size_t>(side_) * sizeof(float));
    weigh(importance);
    fit_smooth(target_);
    subtract_smooth();
    select_rest();
    double best = error();
    store(bytes);
    // Refits of both parts in turns, and steps down the weighted error, while they help.
    for (int round = 0; round < (importance ? kWeightedRounds : kRounds); ++round) {
      remaining();  // work_ = what both parts leave
      fit_smooth_again();
      subtract_smooth();
      if (importance)
        step();
      else
        select_rest();
      const double now = error();
      if (!(now < best * (1 - 1e-5))) break;
      best = now;
      store(bytes);
    }
  }

 private:
  static constexpr int kRounds = 1, kWeightedRounds = 12;
  struct Gram {
    double at[kSmooth][kSmooth];
  };

  const float* smooth(int k) const { return tables_.smooth.get() + k * count_; }

  // Column weights, the largest 1: a gradient step of one is then the longest that is safe.
  void weigh(const float* importance) {
    column_.assign(static_cast<size_t>(side_), 1.0f);
    if (!importance) return;
    const float peak = *std::max_element(importance, importance + side_);
    for (int64_t j = 0; j < side_; ++j) column_[j] = importance[j] / peak;
  }

  // Least squares of the eight coefficients for x (side, side), as float16 values.
  void fit_smooth(const std::vector<float>& x) {
    double system[kSmooth][kSmooth] = {}, sums[kSmooth];
    for (int64_t j = 0; j < side_; ++j)
      for (int a = 0; a < kSmooth; ++a)
        for (int b = 0; b < kSmooth; ++b) system[a][b] += column_[j] * gram_[j].at[a][b];
    for (int64_t at = 0; at < count_; ++at) kept_[at] = x[at] * column_[at % side_];
    correlate(tables_.smooth.get(), kept_.data(), count_, sums);
    solve(system, sums);
    for (int k = 0; k < kSmooth; ++k)
      coefficient_[k] = half_value(half_bits(static_cast<float>(sums[k])));
  }
  void fit_smooth_again() {
    hybrid_smooth(tables_, coefficient_, nullptr, kept_.data(), side_);
    for (int64_t at = 0; at < count_; ++at) work_[at] += kept_[at];
    fit_smooth(work_);
  }
  // rest_: the target without the smooth part.
  void subtract_smooth() {
    hybrid_smooth(tables_, coefficient_, nullptr, rest_.data(), side_);
    for (int64_t at = 0; at < count_; ++at) rest_[at] = target_[at] - rest_[at];
  }

  void forward(const std::vector<float>& x, std::vector<float>& to) {
    product(tables_.cosine.get(), x.data(), side_, kept_.data());
    product(kept_.data(), turned_.data(), side_, to.data());
  }
  // The largest of spectrum_, the first of equals, with their values as float16.
  void select() {
    std::iota(order_.begin(), order_.end(), 0);
    const auto larger = [&](int32_t a, int32_t b) {
      const float x = std::abs(spectrum_[a]), y = std::abs(spectrum_[b]);
      return x != y ? x > y : a < b;
    };
    if (terms_ < count_)
      std::nth_element(order_.begin(), order_.begin() + terms_, order_.end(), larger);
    std::sort(order_.begin(), order_.begin() + terms_);
    for (int64_t e = 0; e < terms_; ++e) {
      position_[e] = static_cast<uint16_t>(order_[e]);
      value_[e] = half_value(half_bits(spectrum_[order_[e]]));
    }
  }
  void select_rest() {
    forward(rest_, spectrum_);
    select();
  }

  // work_ = rest_ minus the waves of the chosen terms.
  void remaining() {
    hybrid_spread(tables_, position_.data(), value_.data(), terms_, g_.data());
    hybrid_waves(tables_, g_.data());
    const int64_t width = hybrid_width(side_);
    for (int64_t at = 0; at < count_; ++at)
      work_[at] = rest_[at] - g_[at / side_ * width + at % side_];
  }
  double error() {
    remaining();
    double sum = 0;
    for (int64_t i = 0; i < side_; ++i) {
      double row = 0;
      for (int64_t j = 0; j < side_; ++j) {
        const double miss = work_[i * side_ + j];
        row += column_[j] * miss * miss;
      }
      sum += row;
    }
    return sum;
  }
  // One step down the weighted error from the chosen terms, to the largest again.
  void step() {
    remaining();
    for (int64_t at = 0; at < count_; ++at) work_[at] *= column_[at % side_];
    forward(work_, spectrum_);
    for (int64_t e = 0; e < terms_; ++e) spectrum_[position_[e]] += value_[e];
    select();
  }

  void store(uint8_t* bytes) const {
    const auto word = [&](int64_t at, uint16_t value) {
      bytes[2 * at] = static_cast<uint8_t>(value);
      bytes[2 * at + 1] = static_cast<uint8_t>(value >> 8);
    };
    for (int k = 0; k < kSmooth; ++k) word(k, half_bits(coefficient_[k]));
    for (int64_t e = 0; e < terms_; ++e) {
      word(kSmooth + e, position_[e]);
      word(kSmooth + terms_ + e, half_bits(value_[e]));
    }
  }

  const HybridTables& tables_;
  int64_t side_, count_, terms_;
  float coefficient_[kSmooth] = {};
  std::vector<float> target_, rest_, spectrum_, kept_, work_, turned_, g_, value_, column_;
  std::vector<uint16_t> position_;
  std::vector<int32_t> order_;
  std::vector<Gram> gram_;
};

}  // namespace

void hybrid_encode(const Layer& layer, const float* w, const EncodeOptions& options, int64_t tile0,
                   int64_t tile1, uint8_t* codes, float* const*) {
  const int64_t side = layer.tile.rows;
  Encoder encoder(side, (layer.tile.bytes - 2 * kSmooth) / 4);
  for (int64_t t = tile0; t < tile1; ++t) {
    const int64_t row = t / layer.tile_cols() * side, col = t % layer.tile_cols() * side;
    encoder.run(w + row * layer.in + col, layer.in,
                options.importance ? options.importance + col : nullptr,
                codes + t * layer.tile.bytes);
  }
}

}  // namespace rs
