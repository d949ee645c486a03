#include "tables.h"

#include "../trig.h"
#include "grid.cuh"

namespace rs::cuda {
namespace {

// One block, a thread owns one entry.
__global__ void __launch_bounds__(kTurn) cosine_kernel(float* table) {
  table[threadIdx.x] = static_cast<float>(turn_cosine(threadIdx.x, kTurn));
}

}  // namespace

cudaError_t turn_cosines(float* table, cudaStream_t stream) {
  return run(cosine_kernel, 1, kTurn, 0, stream, table);
}

}  // namespace rs::cuda
