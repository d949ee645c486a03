// The frame around T on the device: scales and block Hadamard transforms, the same float32 bits as
// cpu/frame.h.
#pragma once

#include "types.h"

namespace rs::cuda {

struct FrameRows {
  const void* x;
  Type x_type;
  int64_t x_stride;
  void* y;
  Type y_type;
  int64_t y_stride;
  int64_t rows;
  int64_t n, width;     // columns of x that count; columns of y, zero from n on
  const float* before;  // (n,) or null
  int64_t block;        // of the transform; 1 for none
  const float* after;   // (n,) or null
};

// y = after * Hadamard(before * x) for each row, in one launch. y may be x.
cudaError_t frame_rows(const FrameRows& rows, cudaStream_t stream);

// Transforms each run of `block` rows of x (rows, n), rows `stride` apart, in place.
cudaError_t hadamard_columns(float* x, int64_t rows, int64_t n, int64_t stride, int64_t block,
                             cudaStream_t stream);

// w (rows, n) = t * out_scale * in_scale, or that added to w; t has rows `stride` apart.
cudaError_t scale_rows(const float* t, int64_t stride, int64_t rows, int64_t n,
                       const float* out_scale, const float* in_scale, bool add, float* w,
                       cudaStream_t stream);

}  // namespace rs::cuda
