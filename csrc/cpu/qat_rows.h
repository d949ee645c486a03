// Rows of a weight quantized to levels, forward and backward, on the CPU.
#pragma once

#include "../qat.h"

namespace rs::qat {

// One row of n weights: q = scale * f (may be null), and the sum of its squared errors.
double quantize_row(const Settings& settings, const float* w, float scale, int64_t n, float* q);

// What a row's backward adds up.
struct RowSums {
  double scale;
  double* levels;  // `count` sums that the row adds to; null where not wanted
};

// One row's backward. dw holds dLoss/dq and becomes dLoss/dw; q as above; `loss` is 2 *
// dLoss/d(loss) / number of weights.
void quantize_row_backward(const Settings& settings, const Range& range, const float* w,
                           float scale, float loss, int64_t n, float* dw, float* q, RowSums& sums);

}  // namespace rs::qat
