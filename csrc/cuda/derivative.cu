#include "derivative.h"

#include <algorithm>

#include "grid.cuh"

namespace rs::cuda {
namespace {

constexpr int kThreads = 256, kPerThread = 8, kMaxTable = 1024;

__constant__ BitTables tables;

// A block owns kThreads * kPerThread consecutive codes, a thread every kThreads-th of them; each
// code is read once and the layout's table once per block, into shared memory: threads look up
// different entries, which constant memory would serve one after the other.
__global__ void __launch_bounds__(kThreads)
    bit_derivative_kernel(BitLayout layout, const int32_t* __restrict__ codes, int order, int64_t n,
                          int16_t* __restrict__ out) {
  __shared__ int16_t table[kMaxTable];
  for (int i = threadIdx.x; i < layout.size(); i += kThreads)
    table[i] = tables.at[layout.first + i];
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kPerThread;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t i = first + k * kThreads + threadIdx.x;
    if (i < n) out[i] = bit_value(layout, table, codes[i], order);
  }
}

}  // namespace

cudaError_t bit_derivative(const BitLayout& layout, const int32_t* codes, int order, int64_t n,
                           int16_t* out, cudaStream_t stream) {
  constexpr int64_t kBlock = kThreads * kPerThread;
  constexpr int64_t kLaunch = kBlock << 30;  // codes of one launch: a grid has at most 2^31 blocks
  for (int64_t begin = 0; begin < n; begin += kLaunch) {
    const int64_t count = std::min(kLaunch, n - begin);
    const auto blocks = static_cast<unsigned>((count + kBlock - 1) / kBlock);
    if (const cudaError_t error = run(bit_derivative_kernel, blocks, kThreads, 0, stream, layout,
                                      codes + begin, order & 3, count, out + begin);
        error != cudaSuccess)
      return error;
  }
  return cudaSuccess;
}

}  // namespace rs::cuda
