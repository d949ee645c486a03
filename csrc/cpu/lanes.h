// Products with codes that are looked up as int16: activations in the order of the lookups.
//
// A block of codes fills one 512-bit register. Its 32 int16 words are 32/unit lanes of `unit`
// neighbouring weights, and `parts` lookups of one register each bring the block's weights: lane l
// of lookup k stands for columns (l * parts + k) * unit and following. The integers are flushed to
// float32 after every block.
#pragma once

#include <vector>

#include "../codec.h"
#include "integers.h"
#include "parallel.h"

namespace rs {

constexpr int kTableTop = 16383;  // of the integers in a table
constexpr int kMaxLaneRows = 8;   // rows a kernel takes at once

// The largest activation whose `parts` products of pairs stay below 2^31.
constexpr int lane_top(int parts) {
  return std::min(32767, static_cast<int>(0x7FFFFFFFll / (2ll * parts * kTableTop)));
}

//   values[((block * batch + row) * parts + k) * 32 + word]
struct LaneActivations {
  int batch, parts;
  int64_t blocks;
  Lines<int16_t> values;
  float unit[kMaxBatch];  // of the row's integers

  LaneActivations(const float* x, int64_t m, int64_t in, int parts, int lane)
      : batch(static_cast<int>(std::bit_ceil(static_cast<uint64_t>(m)))),
        parts(parts),
        blocks((in + parts * 32 - 1) / (parts * 32)),
        values(blocks * batch * parts * 32) {
    const int columns = parts * 32;
    std::vector<int16_t> q(static_cast<size_t>(blocks * columns));
    std::vector<int> from(static_cast<size_t>(columns));
    for (int k = 0; k < parts; ++k)
      for (int word = 0; word < 32; ++word)
        from[k * 32 + word] = (word / lane * parts + k) * lane + word % lane;
    for (int64_t b = 0; b < m; ++b) {
      const Quantum quantum(x + b * in, in, lane_top(parts));
      unit[b] = quantum.unit;
      for (int64_t i = 0; i < in; ++i) q[static_cast<size_t>(i)] = quantum(x[b * in + i]);
      for (int64_t block = 0; block < blocks; ++block) {
        int16_t* to = values.get() + (block * batch + b) * columns;
        for (int i = 0; i < columns; ++i) to[i] = q[static_cast<size_t>(block * columns + from[i])];
      }
    }
  }
};

// n floats as integers, value ~ at[i] * unit, repeated up to 128.
struct IntegerTable {
  float unit;
  alignas(64) int16_t at[128];

  IntegerTable(const float* values, int n) {
    const Quantum quantum(values, n, kTableTop);
    unit = quantum.unit;
    for (int i = 0; i < 128; ++i) at[i] = quantum(values[i % n]);
  }
};

struct LaneProduct {
  const Layer& layer;
  const LaneActivations& x;
  const IntegerTable& table;
  int64_t m;
  float* y;
  int16_t* scratch;
};
using LaneKernel = void (*)(const LaneProduct&, int64_t row0, int64_t row1);

// y[m * out] = x[m * in] @ T^T by the kernels for 1, 2, 4 and 8 rows of x, which get `scratch`
// integers of their own.
inline void lane_linear(const Layer& layer, const float* x, int64_t m, float* y,
                        const IntegerTable& table, int parts, int lane,
                        const LaneKernel (&kernels)[4], int64_t scratch = 0) {
  const int64_t grain = row_grain(layer.out, layer.in);
  for (int64_t b = 0; b < m; b += kMaxBatch) {
    const int64_t batch = std::min<int64_t>(kMaxBatch, m - b);
    const LaneActivations values(x + b * layer.in, batch, layer.in, parts, lane);
    const LaneKernel kernel = kernels[std::bit_width(static_cast<uint64_t>(batch - 1))];
    parallel_for(layer.out, grain, [&](int64_t begin, int64_t end) {
      const Lines<int16_t> own(scratch);
      kernel({layer, values, table, batch, y + b * layer.out, own.get()}, begin, end);
    });
  }
}

// Eight rows of x would come from the second-level cache for every row of codes: strips of their
// columns, half of the smallest first-level cache, meet kStripRows rows of codes each.
constexpr int kStripRows = 8;
constexpr int64_t kStripColumns = 512;
inline int64_t strip_tiles(const Layer& layer) {
  return std::clamp<int64_t>(kStripColumns / layer.tile.cols, 1, layer.tile_cols());
}
// Brings tiles [first, last) of all, which the hardware does not foresee, to the caches.
inline void prefetch_tiles(const Layer& layer, int64_t first, int64_t last) {
  const int64_t end = std::min(last, layer.tile_rows() * layer.tile_cols()) * layer.tile.bytes;
  for (int64_t at = first * layer.tile.bytes; at < end; at += 64)
    __builtin_prefetch(layer.codes + at);
}

// Where column 0 of B rows of x is; rows that are not there are the last.
template <int B>
struct RowStarts {
  const float* at[B];

  RowStarts(const float* x, int64_t m, int64_t in) {
    for (int b = 0; b < B; ++b) at[b] = x + (b < m ? b : m - 1) * in;
  }
};

// The same for codes that are decoded to float32 in registers.
using FloatKernel = void (*)(const Layer&, const float* x, int64_t m, float* y, int64_t row0,
                             int64_t row1);

inline void float_linear(const Layer& layer, const float* x, int64_t m, float* y,
                         const FloatKernel (&kernels)[4]) {
  const int64_t rows = layer.tile.rows,
                grain = row_grain(layer.tile_rows(), layer.in * rows) * rows;
  for (int64_t b = 0; b < m; b += kMaxBatch) {
    const int64_t batch = std::min<int64_t>(kMaxBatch, m - b);
    const FloatKernel kernel = kernels[std::bit_width(static_cast<uint64_t>(batch - 1))];
    parallel_for(layer.out, grain, [&](int64_t begin, int64_t end) {
      kernel(layer, x + b * layer.in, batch, y + b * layer.out, begin, end);
    });
  }
}

}  // namespace rs
