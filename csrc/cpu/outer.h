// Products g^T x of two bfloat16 batches with float32 sums, a rectangle at a time, where the
// processor multiplies bfloat16.
#pragma once

#include <cstdint>

#include "integers.h"

namespace rs {

// A batch (rows, n) as blocks of `width` columns, zeros behind the last; in a block one pair of
// rows after the other, and of a pair the two values of a column side by side.
struct PairedBatch {
  int64_t pairs, width;
  Lines<uint32_t> values;

  PairedBatch(const uint16_t* x, int64_t rows, int64_t n, int64_t width);
};
constexpr int64_t kOuterRows = 8, kOuterCols = 32;  // widths of g and of x

// y[rows * stride]: columns [r, r + rows) of g against columns [c, c + cols) of x; r and c are
// multiples of the widths.
void outer_product(const PairedBatch& g, const PairedBatch& x, int64_t r, int64_t rows, int64_t c,
                   int64_t cols, float* y, int64_t stride);

}  // namespace rs
