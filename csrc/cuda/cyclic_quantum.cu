#include <bit>

#include "cyclic_integer.h"
#include "loops.cuh"

namespace rs::cuda {
namespace {

constexpr int kThreads = 256;

// A block owns a row at a time: one unit for it, its numbers as int8, zeros from n to the stride.
// The same operations as rs::Quantum; what is not finite makes the unit NaN.
__global__ void __launch_bounds__(kThreads)
    quantum_kernel(const float* __restrict__ x, int64_t rows, int64_t n, int64_t stride,
                   int8_t* __restrict__ q, float* __restrict__ units) {
  __shared__ uint32_t largest;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const float* from = x + row * n;
    __syncthreads();
    if (threadIdx.x == 0) largest = 0;
    __syncthreads();
    uint32_t own = 0;
    for (int64_t i = threadIdx.x; i < n; i += kThreads)
      own = max(own, std::bit_cast<uint32_t>(from[i]) & 0x7FFFFFFFu);
    atomicMax(&largest, own);
    __syncthreads();
    const float peak = std::bit_cast<float>(largest);
    const bool finite = largest < 0x7F800000u, some = finite && peak >= 1e-30f;
    const float inverse = some ? kQuantumTop / peak : 0.0f;
    if (threadIdx.x == 0)
      units[row] = some ? peak / kQuantumTop : finite ? 0.0f : std::bit_cast<float>(0x7FC00000u);
    for (int64_t i = threadIdx.x; i < stride; i += kThreads)
      q[row * stride + i] = i < n ? static_cast<int8_t>(std::bit_cast<uint32_t>(
                                        add(mul(from[i], inverse), 12582912.0f)))
                                  : int8_t{0};
  }
}

}  // namespace

cudaError_t quantise_rows(const float* x, int64_t rows, int64_t n, int64_t stride, int8_t* q,
                          float* units, cudaStream_t stream) {
  return run(quantum_kernel, blocks_for(rows, 1), kThreads, 0, stream, x, rows, n, stride, q,
             units);
}

}  // namespace rs::cuda
