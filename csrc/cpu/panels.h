// Products by bfloat16 panels: weights are decoded a part at a time and multiplied while a cache
// holds them. For processors that multiply bfloat16.
#pragma once

#include <algorithm>

#include "../codec.h"

namespace rs {

// Rows of about `weights` weights, in multiples of `unit`.
inline int64_t rows_of(int64_t weights, int64_t unit, const Layer& layer) {
  return std::max<int64_t>(1, weights / std::max<int64_t>(1, layer.in * unit)) * unit;
}

// y[m * out] = x[m * in] @ T^T; in is even.
void panel_linear(const Row& row, const Layer& layer, const uint16_t* x, int64_t m, float* y);
// dx[m * in] = dy[m * width] @ T, where width is out, or one more and dy zero there, to be even.
void panel_grad_input(const Row& row, const Layer& layer, const uint16_t* dy, int64_t m,
                      int64_t width, float* dx);

}  // namespace rs
