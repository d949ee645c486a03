#include "frame.h"

#include <algorithm>
#include <cmath>

#include "loops.cuh"

namespace rs::cuda {
namespace {

constexpr int kWarps = 8, kRun = 128;  // a warp's columns: the largest transform

float norm_of(int64_t block) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
}

// A warp owns 128 columns of a row, a lane every 32nd of them; each value is read and written once.
// The stages stand in the order of their distance, those up to 16 between lanes.
template <class X, class Y>
__global__ void __launch_bounds__(32 * kWarps)
    frame_kernel(FrameRows f, float norm, int64_t chunks) {
  const int lane = threadIdx.x % 32;
  const int64_t all = f.rows * chunks, step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; i < all;
       i += step) {
    const int64_t row = i / chunks, first = i % chunks * kRun + lane;
    const X* x = static_cast<const X*>(f.x) + row * f.x_stride;
    Y* y = static_cast<Y*>(f.y) + row * f.y_stride;
    float v[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int64_t c = first + 32 * q;
      v[q] = c < f.n ? widen(x[c]) : 0.0f;
      if (f.before && c < f.n) v[q] = mul(v[q], f.before[c]);
    }
    for (int h = 1; h < 32 && h < f.block; h *= 2)
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const float other = __shfl_xor_sync(0xFFFFFFFFu, v[q], h);
        v[q] = lane & h ? add(other, -v[q]) : add(v[q], other);
      }
#pragma unroll
    for (int h = 1; h < 4; h *= 2)
      if (32 * h < f.block) {
#pragma unroll
        for (int q = 0; q < 4; ++q)
          if (!(q & h)) {
            const float a = v[q], b = v[q + h];
            v[q] = add(a, b);
            v[q + h] = add(a, -b);
          }
      }
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int64_t c = first + 32 * q;
      if (f.block > 1) v[q] = mul(v[q], norm);
      if (f.after && c < f.n) v[q] = mul(v[q], f.after[c]);
      if (c < f.width) y[c] = narrow<Y>(c < f.n ? v[q] : 0.0f);
    }
  }
}

constexpr int kColumns = 32, kLanes = 256 / kColumns;

// A block owns 32 columns of one run of rows: read once, all stages in shared memory.
__global__ void __launch_bounds__(256)
    columns_kernel(float* __restrict__ x, int64_t n, int64_t stride, int64_t strips, int block,
                   float norm) {
  __shared__ float strip[kRun][kColumns];
  const int lane = threadIdx.x % kColumns, part = threadIdx.x / kColumns;
  const int64_t c = static_cast<int64_t>(blockIdx.x) % strips * kColumns + lane;
  float* run = x + static_cast<int64_t>(blockIdx.x) / strips * block * stride + c;
  if (c < n)
    for (int i = part; i < block; i += kLanes) strip[i][lane] = run[i * stride];
  __syncthreads();
  for (int h = 1; h < block; h *= 2) {
    for (int i = part; i < block / 2; i += kLanes) {
      const int j = (i & ~(h - 1)) * 2 + (i & (h - 1));
      const float a = strip[j][lane], b = strip[j + h][lane];
      strip[j][lane] = add(a, b);
      strip[j + h][lane] = add(a, -b);
    }
    __syncthreads();
  }
  if (c < n)
    for (int i = part; i < block; i += kLanes) run[i * stride] = mul(strip[i][lane], norm);
}

// A thread owns one weight at a time.
__global__ void __launch_bounds__(kLoopThreads)
    scale_kernel(const float* __restrict__ t, int64_t stride, int64_t rows, int64_t n,
                 const float* __restrict__ out_scale, const float* __restrict__ in_scale, bool sum,
                 float* __restrict__ w) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kLoopThreads + threadIdx.x; i < rows * n;
       i += static_cast<int64_t>(gridDim.x) * kLoopThreads) {
    const int64_t r = i / n, c = i % n;
    float value = t[r * stride + c];
    if (out_scale) value = mul(value, out_scale[r]);
    if (in_scale) value = mul(value, in_scale[c]);
    w[i] = sum ? add(w[i], value) : value;
  }
}

}  // namespace

cudaError_t frame_rows(const FrameRows& f, cudaStream_t stream) {
  const int64_t chunks = (std::max(f.n, f.width) + kRun - 1) / kRun;
  return with_type(f.x_type, [&](auto x) {
    return with_type(f.y_type, [&](auto y) {
      return run(frame_kernel<decltype(x), decltype(y)>, blocks_for(f.rows * chunks, kWarps),
                 32 * kWarps, 0, stream, f, norm_of(f.block), chunks);
    });
  });
}

cudaError_t hadamard_columns(float* x, int64_t rows, int64_t n, int64_t stride, int64_t block,
                             cudaStream_t stream) {
  if (block == 1 || !rows || !n) return cudaSuccess;
  const int64_t strips = (n + kColumns - 1) / kColumns;
  return run(columns_kernel, static_cast<unsigned>(rows / block * strips), 256, 0, stream, x, n,
             stride, strips, static_cast<int>(block), norm_of(block));
}

cudaError_t scale_rows(const float* t, int64_t stride, int64_t rows, int64_t n,
                       const float* out_scale, const float* in_scale, bool add, float* w,
                       cudaStream_t stream) {
  return run(scale_kernel, blocks_for(rows * n, kLoopThreads), kLoopThreads, 0, stream, t, stride,
             rows, n, out_scale, in_scale, add, w);
}

}  // namespace rs::cuda
