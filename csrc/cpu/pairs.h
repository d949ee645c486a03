// Products of bfloat16 matrices with float32 sums, where the processor has them. Along the summed
// dimension values go in pairs, a pair to 32 bits; one left over is paired with zero.
#pragma once

#include <cstdint>

#include "integers.h"

namespace rs {

// Left operand: pair p of row i is at[i / 8 * group + i % 8 * row + p * pair], rows by eights.
struct LeftPairs {
  const uint32_t* at;
  int64_t group, row, pair;
};
constexpr int64_t kPairRows = 8, kPairCols = 32;

// Lays pairs of `rows` rows of x, `stride` apart, column by column: of every `width` of its n
// columns, zeros behind the last, one pair of rows after the other; blocks of columns are `apart`.
void pair_rows(const uint16_t* x, int64_t rows, int64_t n, int64_t stride, int64_t width,
               uint32_t* to, int64_t apart);
// Lays pairs of the first 2 * pairs columns of x, whose rows are `stride` apart, row by row: of
// every `width` rows, zeros behind the last, one pair of columns after the other.
void pair_columns(const uint16_t* x, int64_t rows, int64_t stride, int64_t pairs, int64_t width,
                  uint32_t* to);

// y[rows * stride], or what is to be added to it: a times a right operand of blocks of 32 columns,
// `apart`, of one pair after the other.
void pair_product(LeftPairs a, const uint32_t* b, int64_t apart, int64_t pairs, int64_t rows,
                  int64_t cols, float* y, int64_t stride, bool add);

// y[rows * stride] = w[rows * n] @ x[cols * n]^T for one to kDotCols columns, which pair_product
// would pad to 16.
constexpr int64_t kDotCols = 4;
void dot_product(const uint16_t* w, const uint16_t* x, int64_t n, int64_t rows, int64_t cols,
                 float* y, int64_t stride);

// A batch (rows, n) whose sums are over its rows.
struct PairedBatch {
  int64_t pairs, width;
  Lines<uint32_t> values;

  PairedBatch(const uint16_t* x, int64_t rows, int64_t n, int64_t width);
  const uint32_t* column(int64_t c) const { return values.get() + c * pairs; }
};

}  // namespace rs
