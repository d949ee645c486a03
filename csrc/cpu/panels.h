// Products by bfloat16 panels: weights are decoded a part at a time and multiplied while a cache
// holds them. For processors that multiply bfloat16.
#pragma once

#include "../codec.h"

namespace rs {

// y[m * out] = x[m * in] @ T^T; in is even.
void panel_linear(const Row& row, const Layer& layer, const uint16_t* x, int64_t m, float* y);
// dx[m * in] = dy[m * width] @ T, where width is out, or one more and dy zero there, to be even.
void panel_grad_input(const Row& row, const Layer& layer, const uint16_t* dy, int64_t m,
                      int64_t width, float* dx);

}  // namespace rs
