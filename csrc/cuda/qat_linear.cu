#include "qat_linear.h"

#include <algorithm>

#include "grid.cuh"

namespace rs::cuda {
namespace {

using qat::Gradients;
using qat::Mode;
using qat::Range;
using qat::Settings;

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = int64_t{1} << 30;
static_assert(qat::kMaxLevels <= kThreads);

// The sum of x over the block's threads, in a fixed order, in every thread.
__device__ double block_sum(double x) {
  __shared__ double part[kThreads];
  __syncthreads();
  part[threadIdx.x] = x;
  __syncthreads();
  for (int half = kThreads / 2; half; half /= 2) {
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    __syncthreads();
  }
  return part[0];
}

__device__ void load_levels(const Settings& s, float* levels) {
  for (int k = threadIdx.x; k < s.count; k += kThreads) levels[k] = s.centers[k];
  __syncthreads();
}

// One weight on its levels: f, the nearest level's index, and for gumbel what the derivatives need.
struct Found {
  float u, f, nearest, e, mean, total, spread;
  int code;
};

__device__ Found find(const Settings& s, const float* levels, float w, float scale) {
  Found x{};
  x.u = w / scale;
  x.nearest = levels[0];
  float best = fabsf(x.u - levels[0]);
  for (int k = 1; k < s.count; ++k) {
    const float d = fabsf(x.u - levels[k]);
    if (d < best) best = d, x.nearest = levels[k], x.code = k;
  }
  x.f = x.nearest;
  if (s.mode != Mode::gumbel) return x;
  x.e = x.u - x.nearest;
  float first = 0, second = 0;
  for (int k = 0; k < s.count; ++k) {
    const float delta = levels[k] - x.nearest, p = qat::odds(x.e, delta, s.inverse_tau);
    x.total += p;
    first += p * delta;
    second += p * delta * delta;
  }
  x.mean = first / x.total;
  x.f = x.nearest + x.mean;
  x.spread = second / x.total - x.mean * x.mean;
  return x;
}

// A block owns a row at a time, a thread every kThreads-th column of it; each weight is read once
// and the levels once per block, into shared memory.
template <class Q>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(Settings s, WeightRows weight, Q* __restrict__ q, double* __restrict__ errors) {
  __shared__ float levels[qat::kMaxLevels];
  load_levels(s, levels);
  for (int64_t row = blockIdx.x; row < weight.rows; row += gridDim.x) {
    const float scale = weight.scale[weight.per_row ? row : 0];
    double squares = 0;
    for (int64_t j = threadIdx.x; j < weight.in; j += kThreads) {
      const int64_t i = row * weight.in + j;
      const float w = weight.w[i], value = scale * find(s, levels, w, scale).f, error = w - value;
      q[i] = narrow<Q>(value);
      squares += static_cast<double>(error * error);
    }
    squares = block_sum(squares);
    if (threadIdx.x == 0) errors[row] = squares;
  }
}

// A block owns a row at a time and takes it in tiles of kThreads columns. First a thread owns one
// column: weight and gradient are read once, what the levels need stays in shared memory. Then a
// thread owns one level and every (kThreads / levels)-th column, and keeps their sum.
template <class Q>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(Settings s, WeightRows weight, const float* __restrict__ grad_loss,
                    double weights, float* __restrict__ dw, Q* __restrict__ q,
                    double* __restrict__ level_sums, double* __restrict__ scale_sums) {
  __shared__ float levels[qat::kMaxLevels];
  __shared__ float e[kThreads], nearest[kThreads], mean[kThreads], g[kThreads];
  __shared__ int code[kThreads];
  __shared__ double part[kThreads];
  load_levels(s, levels);
  const Range range = qat::range_of(levels, s.count);
  const bool soft = s.mode == Mode::gumbel;
  const float loss = static_cast<float>(2.0 * static_cast<double>(*grad_loss) / weights);
  const int slots = kThreads / s.count, level = threadIdx.x % s.count, slot = threadIdx.x / s.count;
  for (int64_t row = blockIdx.x; row < weight.rows; row += gridDim.x) {
    const float scale = weight.scale[weight.per_row ? row : 0];
    double scale_sum = 0, level_sum = 0;
    for (int64_t first = 0; first < weight.in; first += kThreads) {
      const int64_t j = first + threadIdx.x, i = row * weight.in + j;
      const int columns = static_cast<int>(min(int64_t{kThreads}, weight.in - first));
      if (j < weight.in) {
        const Found x = find(s, levels, weight.w[i], scale);
        const float value = scale * x.f, pull = loss * (weight.w[i] - value);
        const Gradients d =
            soft ? qat::soft_gradients(dw[i], pull, x.u, x.f, 2.0f * s.inverse_tau * x.spread)
                 : qat::hard_gradients(dw[i], pull, x.u, x.f, qat::slope(x.u, range, s.mode),
                                       s.commitment);
        dw[i] = d.weight;
        if (q) q[i] = narrow<Q>(value);
        scale_sum += static_cast<double>(d.scale);
        e[threadIdx.x] = x.e, nearest[threadIdx.x] = x.nearest, mean[threadIdx.x] = x.mean;
        code[threadIdx.x] = x.code;
        g[threadIdx.x] = soft ? d.level * scale / x.total : d.level * scale;
      }
      if (!level_sums) continue;
      __syncthreads();
      for (int c = slot; slot < slots && c < columns; c += slots) {
        if (!soft) {
          level_sum += code[c] == level ? static_cast<double>(g[c]) : 0.0;
          continue;
        }
        const float delta = levels[level] - nearest[c];
        const float odds = qat::odds(e[c], delta, s.inverse_tau);
        level_sum += static_cast<double>(
            g[c] * qat::level_derivative(odds, e[c], delta, mean[c], s.inverse_tau));
      }
      __syncthreads();
    }
    scale_sum = block_sum(scale_sum);
    if (threadIdx.x == 0) scale_sums[row] = scale_sum;
    if (!level_sums) continue;
    part[threadIdx.x] = level_sum;
    __syncthreads();
    if (threadIdx.x < s.count) {
      double sum = 0;
      for (int k = 0; k < slots; ++k) sum += part[k * s.count + threadIdx.x];
      level_sums[row * s.count + threadIdx.x] = sum;
    }
    __syncthreads();
  }
}

// A block owns one sum, a thread every kThreads-th part of it.
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const double* __restrict__ parts, int64_t n, int count, double factor,
               float* __restrict__ sums) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += parts[i * count + blockIdx.x];
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = static_cast<float>(factor * sum);
}

unsigned blocks(int64_t rows) { return static_cast<unsigned>(std::min(rows, kMostBlocks)); }

}  // namespace

cudaError_t quantize_rows(const Settings& settings, const WeightRows& weight, void* q, Type type,
                          double* errors, cudaStream_t stream) {
  return with_type(type, [&](auto t) {
    using Q = decltype(t);
    return run(quantize_kernel<Q>, blocks(weight.rows), kThreads, 0, stream, settings, weight,
               static_cast<Q*>(q), errors);
  });
}

cudaError_t quantize_rows_backward(const Settings& settings, const WeightRows& weight,
                                   const float* grad_loss, double weights, float* dw, void* q,
                                   Type type, double* level_sums, double* scale_sums,
                                   cudaStream_t stream) {
  return with_type(type, [&](auto t) {
    using Q = decltype(t);
    return run(backward_kernel<Q>, blocks(weight.rows), kThreads, 0, stream, settings, weight,
               grad_loss, weights, dw, static_cast<Q*>(q), level_sums, scale_sums);
  });
}

cudaError_t sum_parts(const double* parts, int64_t n, int count, double factor, float* sums,
                      cudaStream_t stream) {
  return run(sum_kernel, static_cast<unsigned>(count), kThreads, 0, stream, parts, n, count, factor,
             sums);
}

}  // namespace rs::cuda
