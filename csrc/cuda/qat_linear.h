// Rows of a weight quantized to levels on a GPU. Raw pointers, no torch header.
#pragma once

#include "../qat.h"
#include "types.h"

namespace rs::cuda {

// Rows of a weight, (rows, in) float32 without gaps. scale: one for each row, or one in all.
struct WeightRows {
  const float* w;
  const float* scale;
  bool per_row;
  int64_t rows, in;
};

// q (rows, in) of `type`; errors (rows,): each row's sum of squared errors.
cudaError_t quantize_rows(const qat::Settings& settings, const WeightRows& weight, void* q,
                          Type type, double* errors, cudaStream_t stream);

// dw holds dLoss/dq and becomes dLoss/dw. q may be null. level_sums (rows, count) may be null;
// scale_sums (rows,). grad_loss: one float; `weights`: of the whole matrix.
cudaError_t quantize_rows_backward(const qat::Settings& settings, const WeightRows& weight,
                                   const float* grad_loss, double weights, float* dw, void* q,
                                   Type type, double* level_sums, double* scale_sums,
                                   cudaStream_t stream);

// sums[k] = factor * the sum of parts[i][k] over i < n, always in the same order.
cudaError_t sum_parts(const double* parts, int64_t n, int count, double factor, float* sums,
                      cudaStream_t stream);

}  // namespace rs::cuda
