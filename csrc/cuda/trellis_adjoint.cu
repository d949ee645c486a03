// Gradients of the code's table: of its points first, then of radius and angle.
#include "loops.cuh"
#include "trellis.cuh"
#include "trellis_slots.h"

namespace rs::cuda {
namespace {

constexpr int kWarps = kLoopThreads / 32, kSums = 2 * kPoints;
// A term counts in steps of at most 2^-29 of the largest: what sum_scale gives for this many terms,
// and 31 bits with the sign. A block's sums of the terms' upper 15 bits and of their lower 16 are a
// word each, which holds kBlockTerms of them.
constexpr int64_t kScaleTerms = int64_t{1} << 31;
constexpr int kBlockTerms = 1 << 16;
constexpr int kRoundsPerFlush = kBlockTerms / (32 * kLoopThreads);

// The sums and their fold are the same for every K.
using Code = Trellis<4>;

struct BlockSums {
  uint32_t low[kSums];
  int32_t high[kSums];

  __device__ __forceinline__ void add(int i, int32_t steps) {
    atomicAdd(low + i, static_cast<uint32_t>(steps) & 0xFFFF);
    atomicAdd(high + i, steps >> 16);
  }
  // Adds all sums to `all` and clears them; between two barriers.
  __device__ __forceinline__ void flush(Sum* all) {
    for (int i = threadIdx.x; i < kSums; i += kLoopThreads) {
      const int64_t sum = static_cast<int64_t>(high[i]) * 65536 + low[i];
      if (sum) atomicAdd(all + i, static_cast<Sum>(sum));
      low[i] = 0;
      high[i] = 0;
    }
  }
};

// A block owns every gridDim-th eight steps of 2 x 4 tiles and its own sums, a warp a step, a lane
// four rows of a tile; codes and dw are read once, dw 16 bytes at a time.
template <int K>
__global__ void __launch_bounds__(kLoopThreads)
    trellis_adjoint_kernel(LayerView layer, int64_t row0, int64_t row1,
                           const float* __restrict__ dw, const float* __restrict__ largest,
                           Sum* __restrict__ all) {
  __shared__ BlockSums sums;
  for (int i = threadIdx.x; i < kSums; i += kLoopThreads) sums.low[i] = 0, sums.high[i] = 0;
  __syncthreads();
  const SumScale scale = sum_scale(*largest, Code::kGain, kScaleTerms);
  const float first = scale.first, second = static_cast<float>(scale.second);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t across = (layer.in / 16 + 3) / 4, steps = (row1 - row0 + 1) / 2 * across;
  int rounds = 0;
  for (int64_t step0 = static_cast<int64_t>(blockIdx.x) * kWarps; step0 < steps;
       step0 += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t step = step0 + warp;
    const int64_t row = row0 + step / across * 2 + Wide::row(lane);
    const int64_t col = step % across * 4 + Wide::col(lane);
    if (step < steps) {
      const int64_t tile = min(row, row1 - 1) * (layer.in / 16) + min(col, layer.in / 16 - 1);
      uint32_t words[K + 1];
      load_quarter<K>(layer.codes + tile * (16 * K) + Wide::quarter(lane) * (4 * K), words);
      words[K] = __shfl_sync(0xFFFFFFFFu, words[0], Wide::beyond(lane));
      if (row < row1 && col < layer.in / 16) {
        const float* at = dw + ((row - row0) * 16 + 4 * Wide::quarter(lane)) * layer.in + col * 16;
#pragma unroll
        for (int n = 0; n < 32; n += 2) {
          const float4 d =
              __ldcs(reinterpret_cast<const float4*>(at + n / 8 * layer.in + n % 8 * 2));
          const float of[4] = {d.x, d.y, d.z, d.w};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint32_t p = quarter_hash<K>(words, n + i / 2);
            const int32_t term = __float2int_rn(of[i] * first * second);
            const bool negative = p >> (i % 2 ? 31 : 15) & 1;
            sums.add(i % 2 * kPoints + static_cast<int>(p >> 5 & (kPoints - 1)),
                     negative ? -term : term);
          }
        }
      }
    }
    if (++rounds == kRoundsPerFlush) {
      rounds = 0;
      __syncthreads();
      sums.flush(all);
      __syncthreads();
    }
  }
  __syncthreads();
  sums.flush(all);
}

// One block: a thread owns one entry of radius or angle.
__global__ void __launch_bounds__(128)
    trellis_fold_kernel(LayerView layer, const double* __restrict__ sums, Grads grads) {
  alignas(16) __shared__ unsigned char raw[sizeof(Code::Tables)];
  auto& tables = *reinterpret_cast<Code::Tables*>(raw);
  const int i = threadIdx.x;
  if (i < kTrellisRadii) tables.radius[i] = layer.params[kTrellisRadius][i];
  if (i < kTrellisAngles)
    polar_direction(layer.params[kTrellisAngle][i], &tables.cosine[i], &tables.sine[i]);
  __syncthreads();
  if (i < Code::kFolds) Code::fold(i, tables, sums, grads.of);
}

template <int K>
cudaError_t adjoint(const LayerView& layer, int64_t row0, int64_t row1, const float* dw,
                    const float* largest, void* sums, float* const*, cudaStream_t stream) {
  const int64_t steps = (row1 - row0 + 1) / 2 * ((layer.in / 16 + 3) / 4);
  const unsigned blocks =
      std::min(blocks_for(steps, kWarps), static_cast<unsigned>(4 * processors()));
  if (const cudaError_t error = run(trellis_adjoint_kernel<K>, blocks, kLoopThreads, 0, stream,
                                    layer, row0, row1, dw, largest, static_cast<Sum*>(sums));
      error != cudaSuccess)
    return error;
  return collect_sums<Code>(largest, kScaleTerms, kSums, sums, stream);
}

cudaError_t finish(const LayerView& layer, const void* sums, float* const* grads,
                   cudaStream_t stream) {
  return run(trellis_fold_kernel, 1, 128, 0, stream, layer, all_sums(sums, kSums), grads_of(grads));
}

}  // namespace

void trellis_adjoint_slots(CudaRow& row, int k) {
  row.sum_bytes = sum_bytes(kSums);
  row.finish = finish;
  with_trellis_bits(k, [&]<int K> { row.adjoint = adjoint<K>; });
}

}  // namespace rs::cuda
