// Products of a few rows of float32 weights with a few rows of activations or gradients.
#pragma once

#include <cstdint>

namespace rs {

// y[b * stride + i] = sum over j of w[i * n + j] * x[b * n + j], i < rows, b < m. Sums are made in
// a fixed order, whatever the instruction set, rows and m.
void dots(const float* w, int64_t rows, const float* x, int64_t m, int64_t n, float* y,
          int64_t stride);

// dx[b * n + j] += sum over i < rows of dy[b * stride + i] * w[i * n + j], b < m, in the order of
// i.
void add_rows(const float* w, int64_t rows, const float* dy, int64_t m, int64_t stride, int64_t n,
              float* dx);

}  // namespace rs
