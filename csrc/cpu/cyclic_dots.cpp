#include "cyclic_dots.h"

#include <atomic>
#include <cmath>

#include "clones.h"
#include "cyclic_product.h"
#include "parallel.h"
#include "widths.h"

namespace rs {
namespace {

constexpr int kByteTop = 127;
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: its low sixteen bits are zero
// Sums of so many products of bytes are exact in float32.
constexpr int64_t kLongestExact = 1024;

// The largest norm of n stretches of x; NaN if there is one.
double longest(const float* x, int64_t n, int64_t length) {
  double most = 0;
  for (int64_t i = 0; i < n; ++i) {
    double square = 0;
    for (int64_t j = 0; j < length; ++j) square += double{x[i * length + j]} * x[i * length + j];
    if (square > most || square != square) most = square;
  }
  return std::sqrt(most);
}

// words[V * L] of one row of x, by as many columns of a basis (block, vectors). Keeps the largest
// dot products' bits, in which NaN is above infinity.
template <int L, int V>
RS_INLINE void dots_of_tile(const float* x, const float* turned, int64_t block, int64_t vectors,
                            float inverse, VectorOf<int32_t, L>& most, int16_t* words) {
  VectorOf<float, L> dots[V];
#pragma GCC unroll 8
  for (int i = 0; i < V; ++i) dots[i] = x[0] * at<float, L>(turned + i * L);
  for (int64_t j = 1; j < block; ++j)
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) dots[i] += x[j] * at<float, L>(turned + j * vectors + i * L);
#pragma GCC unroll 8
  for (int i = 0; i < V; ++i) {
    const auto size = (VectorOf<int32_t, L>)dots[i] & 0x7FFFFFFF;
    most = size > most ? size : most;
    const VectorOf<float, L> rounded = dots[i] * inverse + kRound;
    at<int16_t, L>(words + i * L) =
        __builtin_convertvector((VectorOf<int32_t, L>)rounded, VectorOf<int16_t, L>);
  }
}

// The same of all vectors, a multiple of 16. Returns the largest dot product.
float dots_of_row(const float* x, const float* turned, int64_t block, int64_t vectors,
                  float inverse, int16_t* words) {
  int32_t peak = 0;
  by_width([&]<int L>() RS_LAMBDA {
    constexpr int kTile = 8 * L;
    VectorOf<int32_t, L> most{};
    int64_t k = 0;
    for (; k + kTile <= vectors; k += kTile)
      dots_of_tile<L, 8>(x, turned + k, block, vectors, inverse, most, words + k);
    for (; k < vectors; k += L)
      dots_of_tile<L, 1>(x, turned + k, block, vectors, inverse, most, words + k);
    for (int lane = 0; lane < L; ++lane) peak = std::max(peak, most[lane]);
  });
  return std::bit_cast<float>(peak);
}

typedef float Eight __attribute__((vector_size(32)));
typedef float EightStored __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t EightIntegers __attribute__((vector_size(32)));
typedef int16_t EightWords __attribute__((vector_size(16), aligned(2), may_alias));

// Words of eight of `lanes` rows of x, given as (block, lanes), by a basis (vectors, block).
inline __attribute__((always_inline)) void dots_of_eight(const float* x, const float* basis,
                                                         int64_t block, int64_t vectors,
                                                         int64_t lanes, const float* scales,
                                                         float* peak, int16_t* words) {
  const Eight inverse = *reinterpret_cast<const EightStored*>(scales);
  Eight most{};
  for (int64_t k = 0; k < vectors; ++k, words += lanes) {
    const float* v = basis + k * block;
    Eight dot = *reinterpret_cast<const EightStored*>(x) * v[0];
#pragma GCC unroll 8
    for (int64_t j = 1; j < block; ++j)
      dot += *reinterpret_cast<const EightStored*>(x + j * lanes) * v[j];
    const Eight size = dot < 0 ? -dot : dot;
    most = size > most ? size : most;
    const Eight rounded = dot * inverse + kRound;
    EightIntegers bits;
    __builtin_memcpy(&bits, &rounded, sizeof bits);
    *reinterpret_cast<EightWords*>(words) = __builtin_convertvector(bits, EightWords);
  }
  *reinterpret_cast<EightStored*>(peak) = most;
}
RS_CLONES void dots_of_lanes(const float* x, const float* basis, int64_t block, int64_t vectors,
                             int64_t lanes, const float* inverse, float* peak, int16_t* words) {
  for (int64_t l = 0; l < lanes; l += 8) {
    if (block == 8)  // the usual length is a constant, so that the compiler unrolls
      dots_of_eight(x + l, basis, 8, vectors, lanes, inverse + l, peak + l, words + l);
    else
      dots_of_eight(x + l, basis, block, vectors, lanes, inverse + l, peak + l, words + l);
  }
}

// Floats as integers of at most 127.
std::vector<float> to_bytes(const float* x, int64_t n, const Quantum& quantum) {
  std::vector<float> q(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) q[static_cast<size_t>(i)] = quantum(x[i]);
  return q;
}

}  // namespace

CyclicDots::CyclicDots(const Layer& layer, int64_t vectors, bool integers, int most_lanes)
    : block_(layer.tile.cols),
      columns_(layer.tile_cols()),
      vectors_(vectors),
      integers_(integers),
      basis_(layer.params[kCyclicBasis], layer.params[kCyclicBasis] + block_ * vectors),
      turned_(basis_.size()) {
  if (integers) {
    const Quantum quantum(basis_.data(), block_ * vectors, kByteTop);
    basis_unit_ = quantum.unit;
    basis_ = to_bytes(basis_.data(), block_ * vectors, quantum);
  } else {
    longest_ = longest(basis_.data(), vectors, block_);
  }
  for (int64_t k = 0; k < vectors; ++k)
    for (int64_t j = 0; j < block_; ++j) turned_[j * vectors + k] = basis_[k * block_ + j];
  // Kept over the batch: fresh pages cost as much as the dot products.
  table_ = std::make_unique_for_overwrite<int16_t[]>(
      static_cast<size_t>(round_up(columns_, kCyclicStrip) * vectors * most_lanes));
}

void CyclicDots::fill(const float* x, int batch, int lanes, bool apart) {
  const int64_t in = columns_ * block_, padded = round_up(columns_, kCyclicStrip);
  const auto lane = [&](int b) { return apart ? b : cyclic_lane(b, lanes); };
  rows_ = x;
  wide_ = 0;
  if (integers_) {
    bytes_.resize(static_cast<size_t>(batch * in));
    rows_ = bytes_.data();
  }
  std::fill_n(inverse_, lanes, 0.0f);
  for (int b = 0; b < batch; ++b) {
    if (integers_) {
      const Quantum quantum(x + b * in, in, kByteTop);
      const std::vector<float> q = to_bytes(x + b * in, in, quantum);
      std::copy(q.begin(), q.end(), bytes_.begin() + b * in);
      inverse_[lane(b)] = 1;
      unit_[b] = double{quantum.unit} * basis_unit_;
    } else {
      // No dot product is longer than the longest block of x times the longest vector.
      const auto most = static_cast<float>(longest(x + b * in, columns_, block_) * longest_);
      const Quantum quantum(&most, 1, kCyclicTop);
      inverse_[lane(b)] = quantum.inverse;
      unit_[b] = quantum.unit;
    }
  }
  std::atomic<uint32_t> wide{0};
  parallel_for(columns_, kCyclicStrip, [&](int64_t begin, int64_t end) {
    std::vector<float> side(static_cast<size_t>(block_ * lanes));
    float peak[kCyclicMostLanes];
    for (int64_t c = begin; c < end; ++c) {
      if (apart) {
        for (int b = 0; b < batch; ++b)
          peak[b] = dots_of_row(rows_ + b * in + c * block_, turned_.data(), block_, vectors_,
                                inverse_[b], table_.get() + (b * padded + c) * vectors_);
      } else {
        int16_t* words = table_.get() + c * vectors_ * lanes;
        for (int b = 0; b < batch; ++b)
          for (int64_t j = 0; j < block_; ++j)
            side[j * lanes + lane(b)] = rows_[b * in + c * block_ + j];
        dots_of_lanes(side.data(), basis_.data(), block_, vectors_, lanes, inverse_, peak, words);
      }
      if (integers_)
        for (int b = 0; b < batch; ++b)
          if (!(peak[lane(b)] <= kCyclicTop)) wide |= uint32_t{1} << b;
    }
  });
  const int64_t tables = apart ? batch : 1, width = vectors_ * (apart ? 1 : lanes);
  for (int64_t b = 0; b < tables; ++b)
    std::fill(table_.get() + (b * padded + columns_) * width,
              table_.get() + (b + 1) * padded * width, int16_t{0});
  wide_ = !integers_ ? 0 : block_ > kLongestExact ? ~uint32_t{0} : wide.load();
}

std::vector<int32_t> CyclicDots::wide_table(int b) const {
  std::vector<int32_t> table(static_cast<size_t>(columns_ * vectors_));
  for (int64_t c = 0; c < columns_; ++c)
    for (int64_t j = 0; j < block_; ++j) {
      const auto x = static_cast<int32_t>(rows_[(b * columns_ + c) * block_ + j]);
      for (int64_t k = 0; k < vectors_; ++k)
        table[c * vectors_ + k] += x * static_cast<int32_t>(turned_[j * vectors_ + k]);
    }
  return table;
}

}  // namespace rs
