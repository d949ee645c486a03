#include "sparse.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "../cpu/half.h"
#include "../cpu/integers.h"
#include "../cpu/parallel.h"
#include "../cpu/widths.h"
#include "../hd.h"

namespace rs {
namespace {

void decode(const Layer& layer, int64_t row0, int64_t row1, float* w) {
  std::fill(w, w + (row1 - row0) * layer.in, 0.0f);
  for (int64_t r = row0; r < row1; ++r) {
    float* out = w + (r - row0) * layer.in;
    SparseEntries(layer, r).each(
        0, 1, [&](int64_t c, float v) { out[c] = add(out[c], mul(v, layer.params[0][r])); });
  }
}

void adjoint(const Layer& layer, int64_t row0, int64_t row1, const float* dw, float* const* grads) {
  if (!grads[0]) return;
  for (int64_t r = row0; r < row1; ++r)
    SparseEntries(layer, r).each(
        0, 1, [&](int64_t c, float v) { grads[0][r] += v * dw[(r - row0) * layer.in + c]; });
}

float row_dot(const SparseEntries& entries, const float* x) {
  float sum = 0;
  entries.each(0, 1, [&](int64_t c, float v) { sum += v * x[c]; });
  return sum;
}

// A row's product with kLanes rows of x, whose values of a column are neighbours.
constexpr int kLanes = 16;
template <int L>
RS_INLINE void row_dots(const SparseEntries& entries, const float* turned, float* sums) {
  Wide<float, kLanes, L> sum = {};
  entries.each(0, 1, [&](int64_t c, float v) RS_LAMBDA {
    sum.add(*reinterpret_cast<const Wide<float, kLanes, L>*>(turned + c * kLanes), v);
  });
  std::memcpy(sums, &sum, sizeof sum);
}

// Rows of x by sixteens: values of a column side by side, zeros behind the last row.
Lines<float> turned_rows(const float* x, int64_t m, int64_t in) {
  const int64_t blocks = (m + kLanes - 1) / kLanes;
  Lines<float> turned(blocks * in * kLanes);
  parallel_for(blocks * in, 256, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at)
      for (int64_t b = at / in * kLanes, lane = 0; lane < std::min<int64_t>(kLanes, m - b); ++lane)
        turned[at * kLanes + lane] = x[(b + lane) * in + at % in];
  });
  return turned;
}

void linear(const Layer& layer, const float* x, int64_t m, float* y) {
  const float* scale = layer.params[0];
  if (m == 1)
    return parallel_for(layer.out, 64, [&](int64_t row0, int64_t row1) {
      for (int64_t r = row0; r < row1; ++r) y[r] = row_dot(SparseEntries(layer, r), x) * scale[r];
    });
  const Lines<float> turned = turned_rows(x, m, layer.in);
  parallel_for(layer.out, 64, [&](int64_t row0, int64_t row1) {
    for (int64_t b = 0; b < m; b += kLanes)
      by_width([&]<int L>() RS_LAMBDA {
        for (int64_t r = row0; r < row1; ++r) {
          float sums[kLanes];
          row_dots<L>(SparseEntries(layer, r), turned.get() + b * layer.in, sums);
          for (int64_t lane = 0; lane < std::min<int64_t>(kLanes, m - b); ++lane)
            y[(b + lane) * layer.out + r] = sums[lane] * scale[r];
        }
      });
  });
}

void encode(const Layer& layer, const float* w, const EncodeOptions& options, int64_t tile0,
            int64_t tile1, uint8_t* codes, float* const* params) {
  const int64_t in = layer.in, capacity = (layer.tile.bytes - 2) / 3;
  std::vector<int64_t> order(static_cast<size_t>(in));
  for (int64_t r = tile0; r < tile1; ++r) {
    const float* row = w + r * in;
    auto weight = [&](int64_t c) { return options.importance ? options.importance[c] : 1.0f; };
    auto gain = [&](int64_t c) { return double(row[c]) * row[c] * weight(c); };
    std::iota(order.begin(), order.end(), 0);
    std::nth_element(
        order.begin(), order.begin() + (capacity - 1), order.end(),
        [&](int64_t a, int64_t b) { return gain(a) != gain(b) ? gain(a) > gain(b) : a < b; });
    std::sort(order.begin(), order.begin() + capacity);
    float peak = 0;
    for (int64_t i = 0; i < capacity; ++i) peak = std::max(peak, std::abs(row[order[i]]));
    float scale = round_to_half(peak / 127);
    auto nearest = [&](float value) {
      return scale ? std::clamp(std::nearbyint(value / scale), -127.0f, 127.0f) : 0.0f;
    };
    double qw = 0, qq = 0;
    for (int64_t i = 0; i < capacity; ++i) {
      const double q = nearest(row[order[i]]), h = weight(order[i]);
      qw += h * q * row[order[i]], qq += h * q * q;
    }
    if (qq > 0) scale = round_to_half(static_cast<float>(qw / qq));
    params[0][r] = scale;
    uint8_t* tile = codes + r * layer.tile.bytes;
    int64_t count = 0;
    for (int64_t i = 0; i < capacity; ++i) {
      const auto q = static_cast<int8_t>(nearest(row[order[i]]));
      if (q == 0) continue;
      tile[2 + 2 * count] = static_cast<uint8_t>(order[i]);
      tile[3 + 2 * count] = static_cast<uint8_t>(order[i] >> 8);
      tile[2 + 2 * capacity + count++] = static_cast<uint8_t>(q);
    }
    tile[0] = static_cast<uint8_t>(count);
    tile[1] = static_cast<uint8_t>(count >> 8);
  }
}

void check(const Layer& layer, int64_t row) {
  const SparseEntries entries(layer, row);
  const int64_t count = entries.stored_count();
  if (count > entries.capacity)
    throw std::invalid_argument("an entry count is larger than its row can hold");
  for (int64_t i = 0; i < entries.capacity; ++i) {
    if (i >= count && (entries.column(i) || entries.value(i) != 0))
      throw std::invalid_argument("unused entries must be zero");
    if (i < count &&
        (entries.column(i) >= entries.in || (i && entries.column(i) <= entries.column(i - 1))))
      throw std::invalid_argument("columns must rise and lie inside the row");
  }
}

}  // namespace

std::vector<Term> sparse_terms(const Spec& spec, Shape shape) {
  spec.only({"percent"});
  const double percent = spec.number("percent", 1);
  if (!(percent > 0 && percent <= 100))
    throw std::invalid_argument("sparse: percent must be above 0 and at most 100, got " +
                                spec.word("percent", ""));
  if (shape.in > 65535)
    throw std::invalid_argument(
        "sparse: columns are 16 bits, so in_features must be below 65536, got " +
        std::to_string(shape.in));
  const int64_t width = std::max<int64_t>(1, shape.in);  // a tile is never empty
  const auto n =
      std::clamp<int64_t>(static_cast<int64_t>(std::nearbyint(percent / 100 * shape.in)), 1, width);
  Term term;
  Row& row = term.row;
  row.name = "sparse";
  row.tile = {1, width, 2 + 3 * n};
  row.params = {{"scale", Axis::out, {shape.out}}};
  row.decode = decode;
  row.adjoint = adjoint;
  row.encode = encode;
  row.check = check;
  row.linear = linear;
  row.linear_max_m = int64_t{1} << 40;
  row.encode_batch = 8;
  return {term};
}

}  // namespace rs
