// What the ops share: batches through the frame, and the frame on blocks of weights.
#pragma once

#include <ATen/ATen.h>

#include "../codec.h"

namespace rs {

// Rows of a block on which the frame closes: a multiple of the tile and of the Hadamard block.
int64_t block_rows(const Row& row);

// Whether panels are bfloat16: exact accuracy and processors that do not multiply it have float32.
bool bf16_panels();

// x as (rows, features), contiguous, in float32 or bfloat16.
at::Tensor flat(const at::Tensor& x, int64_t features);

// after * Hadamard(before * x) on the first n columns, `width` columns wide, in `type`.
at::Tensor through_frame(const at::Tensor& x, int64_t n, int64_t width, const float* before,
                         int64_t block, const float* after, at::ScalarType type);

// Both Hadamard transforms on whole blocks of rows, `width` apart, of which the first n columns
// count.
void rotate(const Row& row, float* x, int64_t rows, int64_t width, int64_t n);

// Of the layer's params; null for -1.
const float* param(const Layer& layer, int index);

}  // namespace rs
