// bit_derivative on a GPU. No torch header.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../derivative.h"

namespace rs::cuda {

// out[n] = the order-th derivative of codes[n], asynchronously on the stream.
cudaError_t bit_derivative(const BitLayout& layout, const int32_t* codes, int order, int64_t n,
                           int16_t* out, cudaStream_t stream);

}  // namespace rs::cuda
