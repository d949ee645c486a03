#include "../codecs/uniform.h"
#include "../codecs/uniform_fit.h"
#include "encode_slots.h"
#include "loops.cuh"

namespace rs::cuda {
namespace {

constexpr int kLanes = kUniformLanes;  // threads of a group: the CPU's partial sums

// Sixteen threads own a group at a time, each every sixteenth weight of it, which it reads anew for
// every candidate: from the first-level cache, where a usual group stays.
template <int Bits, bool Symmetric>
__global__ void __launch_bounds__(kLoopThreads)
    fit_kernel(LayerView layer, const float* __restrict__ weights,
               const float* __restrict__ importance, uint8_t* __restrict__ codes,
               float* __restrict__ scales, float* __restrict__ zeros) {
  constexpr int kTop = (1 << Bits) - 1, kGroups = kLoopThreads / kLanes, kMoments = 6;
  __shared__ float parts[kGroups][kMoments][kLanes + 1];
  __shared__ double totals[kGroups][kMoments];
  const int lane = threadIdx.x % kLanes;
  auto& part = parts[threadIdx.x / kLanes];
  double* total = totals[threadIdx.x / kLanes];
  const unsigned mask = 0xFFFFu << (threadIdx.x % 32 / kLanes * kLanes);
  const auto all = [&](float x, auto&& better) {  // the best of the lanes' values, in each of them
    for (int hop = 1; hop < kLanes; hop *= 2) {
      const float other = __shfl_xor_sync(mask, x, hop, kLanes);
      x = better(other, x) ? other : x;
    }
    return x;
  };
  const int64_t n = layer.tile.cols, groups = layer.tile_rows() * layer.tile_cols();
  for (int64_t group = static_cast<int64_t>(blockIdx.x) * kGroups + threadIdx.x / kLanes;
       group < groups; group += static_cast<int64_t>(gridDim.x) * kGroups) {
    const int64_t col = group % layer.tile_cols() * n;
    const float* w = weights + group / layer.tile_cols() * layer.in + col;
    const float* h = importance ? importance + col : nullptr;
    float low = w[0], high = low;
    for (int64_t i = lane; i < n; i += kLanes) {
      low = std::min(low, w[i]);
      high = std::max(high, w[i]);
    }
    low = all(low, [](float a, float b) { return a < b; });
    high = all(high, [](float a, float b) { return a > b; });
    const int exponent = uniform_exponent(std::max(std::fabs(low), std::fabs(high)));
    const auto held = [&](float x) { return exponent ? std::ldexp(x, -exponent) : x; };

    const auto moments = [&](UniformFit fit) {
      const float inverse = inverse_of(fit.scale);
      float sums[kMoments] = {};
      for (int64_t i = lane; i < n; i += kLanes)
        uniform_terms(held(w[i]), h ? h[i] : 1.0f, fit, inverse, static_cast<float>(kTop),
                      0.5f * (kTop + 1), [&](int s, float term) { sums[s] += term; });
#pragma unroll
      for (int s = 0; s < kMoments; ++s) part[s][lane] = sums[s];
      __syncwarp(mask);
      if (lane < kMoments) {
        double sum = 0;
        for (int l = 0; l < kLanes; ++l) sum += part[lane][l];
        total[lane] = sum;
      }
      __syncwarp(mask);
      return UniformMoments{total[0], total[1], total[2], total[3], total[4], total[5]};
    };
    const UniformFit fit = fit_uniform(held(low), held(high), Bits, Symmetric, moments);
    if (lane == 0) {
      scales[group] = std::ldexp(fit.scale, exponent);
      if constexpr (!Symmetric) zeros[group] = fit.zero;
    }
    uint8_t* tile = codes + group * layer.tile.bytes;
    const float inverse = inverse_of(fit.scale);
    for (int64_t i = 8 * lane; i < n; i += 8 * kLanes)  // eight codes are whole bytes
      for (int64_t j = i; j < std::min(i + 8, n); ++j)
        write_bits<Bits>(tile, j * Bits,
                         static_cast<uint32_t>(nearest_code(held(w[j]), inverse, fit.zero, kTop)));
  }
}

template <int Bits, bool Symmetric>
cudaError_t encode(const LayerView& layer, const float* w, const float* importance, uint8_t* codes,
                   float* const* params, void*, cudaStream_t stream) {
  const int64_t groups = layer.tile_rows() * layer.tile_cols();
  return run(fit_kernel<Bits, Symmetric>, blocks_for(groups, kLoopThreads / kLanes), kLoopThreads,
             0, stream, layer, w, importance, codes, params[0], params[1]);
}

template <int Bits>
void fill(CudaRow& row, int bits, bool symmetric) {
  if (bits == Bits) {
    row.encode = symmetric ? encode<Bits, true> : encode<Bits, false>;
    return;
  }
  if constexpr (Bits < 8) fill<Bits + 1>(row, bits, symmetric);
}

}  // namespace

void uniform_encode_slots(CudaRow& row, const Term& term) {
  fill<2>(row, static_cast<int>(term.spec.number("bits", 4)), term.spec.flag("symmetric", false));
}

}  // namespace rs::cuda
