#include "../codecs/vq_cyclic.h"
#include "encode_slots.h"
#include "loops.cuh"

namespace rs::cuda {
namespace {

// A warp owns one tile at a time, a lane one of the 32 codewords that differ in more than sign: a
// vector's weights are read once for all of them. Sums and choices are in the order of the CPU's.
__global__ void __launch_bounds__(kLoopThreads)
    nearest_kernel(LayerView layer, const float* __restrict__ weights,
                   const float* __restrict__ importance, uint8_t* __restrict__ codes) {
  const float* prototypes = layer.params[VqCyclic::kPrototypeValues];
  const int block = static_cast<int>(layer.tile.cols / 4), lane = threadIdx.x % 32;
  const int64_t tiles = layer.out * layer.tile_cols(), warps = kLoopThreads / 32;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / 32; tile < tiles;
       tile += static_cast<int64_t>(gridDim.x) * warps) {
    uint32_t found = 0;
    for (int v = 0; v < 4; ++v) {
      const float* w = weights + tile * layer.tile.cols + v * block;
      const float* h = importance
                           ? importance + tile % layer.tile_cols() * layer.tile.cols + v * block
                           : nullptr;
      float dot = 0, power = 0;
      for (int j = 0; j < block; ++j) {
        const float p = prototypes[vq_source(static_cast<uint32_t>(lane), j, block)];
        const float hp = (h ? h[j] : 1.0f) * p;
        dot += hp * w[j];
        power += hp * p;
      }
      float cost = power - 2.0f * fabsf(dot);
      uint32_t code = dot < 0 ? lane | 32 : lane;
      if (!(cost < INFINITY)) cost = INFINITY, code = 0;
      for (int hop = 1; hop < 32; hop *= 2) {
        const float other = __shfl_xor_sync(0xFFFFFFFFu, cost, hop);
        const uint32_t theirs = __shfl_xor_sync(0xFFFFFFFFu, code, hop);
        const bool better = other < cost || (other == cost && (theirs & 31) < (code & 31));
        cost = better ? other : cost;
        code = better ? theirs : code;
      }
      found |= code << (6 * v);
    }
    if (lane < 3) codes[3 * tile + lane] = static_cast<uint8_t>(found >> (8 * lane));
  }
}

cudaError_t encode(const LayerView& layer, const float* w, const float* importance, uint8_t* codes,
                   float* const*, void*, cudaStream_t stream) {
  return run(nearest_kernel, blocks_for(layer.out * layer.tile_cols(), kLoopThreads / 32),
             kLoopThreads, 0, stream, layer, w, importance, codes);
}

}  // namespace

void vq_cyclic_encode_slots(CudaRow& row) { row.encode = encode; }

}  // namespace rs::cuda
