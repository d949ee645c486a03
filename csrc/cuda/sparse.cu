#include "../codecs/sparse.h"

#include "codecs.h"
#include "loops.cuh"

namespace rs::cuda {
namespace {

constexpr int kStretch = 4096;  // columns of a row gathered at a time, 16 KB
constexpr int kWarps = kLoopThreads / 32;

// A block owns a row at a time: its entries meet in shared memory, a stretch of columns after the
// other, and each weight is written once. Where columns rise, as in every valid code, a thread owns
// an entry; elsewhere it owns a column and reads all entries, so that repeated ones add up in
// order.
template <class T>
__global__ void __launch_bounds__(kLoopThreads)
    row_kernel(LayerView layer, TileRange range, T* __restrict__ w, int64_t stride) {
  __shared__ float stretch[kStretch];
  __shared__ int falls;
  const int thread = threadIdx.x;
  for (int64_t r = range.row0 + blockIdx.x; r < range.row1; r += gridDim.x) {
    const SparseEntries entries(layer, r);
    const int64_t count = entries.count();
    const float scale = layer.params[0][r];
    if (thread == 0) falls = 0;
    __syncthreads();
    for (int64_t e = thread + 1; e < count; e += kLoopThreads)
      if (entries.column(e) <= entries.column(e - 1)) falls = 1;
    __syncthreads();
    const int64_t first = falls ? 0 : thread, step = falls ? 1 : kLoopThreads;
    for (int64_t c0 = 0; c0 < layer.in; c0 += kStretch) {
      const int64_t width = min(int64_t{kStretch}, layer.in - c0);
      for (int64_t c = thread; c < width; c += kLoopThreads) stretch[c] = 0.0f;
      __syncthreads();
      for (int64_t e = first; e < count; e += step) {
        const int64_t c = entries.column(e) - c0;
        if (c >= 0 && c < width && (!falls || c % kLoopThreads == thread))
          stretch[c] = add(stretch[c], mul(entries.value(e), scale));
      }
      __syncthreads();
      for (int64_t c = thread; c < width; c += kLoopThreads)
        w[(r - range.row0) * stride + c0 + c] = narrow<T>(stretch[c]);
      __syncthreads();
    }
  }
}

cudaError_t decode(const LayerView& layer, TileRange range, void* w, int64_t stride, Type type,
                   cudaStream_t stream) {
  return with_type(type, [&](auto t) {
    using T = decltype(t);
    return run(row_kernel<T>, blocks_for(range.row1 - range.row0, 1), kLoopThreads, 0, stream,
               layer, range, static_cast<T*>(w), stride);
  });
}

// Sum of v over the warp, in a fixed order.
__device__ __forceinline__ float warp_sum(float v) {
  for (int h = 16; h; h /= 2) v = add(v, __shfl_xor_sync(0xFFFFFFFFu, v, h));
  return v;
}

// A warp owns a row at a time, a lane every 32nd of its entries.
__global__ void __launch_bounds__(kLoopThreads)
    scale_gradient_kernel(LayerView layer, int64_t row0, int64_t row1, const float* __restrict__ dw,
                          float* __restrict__ grad) {
  const int lane = threadIdx.x % 32;
  for (int64_t r = row0 + static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; r < row1;
       r += static_cast<int64_t>(gridDim.x) * kWarps) {
    float sum = 0;
    SparseEntries(layer, r).each(lane, 32, [&](int64_t c, float v) {
      sum = add(sum, mul(v, dw[(r - row0) * layer.in + c]));
    });
    sum = warp_sum(sum);
    if (lane == 0) grad[r] += sum;
  }
}

cudaError_t adjoint(const LayerView& layer, int64_t row0, int64_t row1, const float* dw,
                    const float*, void*, float* const* grads, cudaStream_t stream) {
  if (!grads[0]) return cudaSuccess;
  return run(scale_gradient_kernel, blocks_for(row1 - row0, kWarps), kLoopThreads, 0, stream, layer,
             row0, row1, dw, grads[0]);
}

constexpr int kBatch = 8;  // rows of x that share one reading of the entries

// A warp owns one row of T and up to 8 rows of x, a lane every 32nd entry: codes are read once for
// 8 products.
template <class T>
__global__ void __launch_bounds__(kLoopThreads)
    linear_kernel(LayerView layer, const T* __restrict__ x, int64_t m, float* __restrict__ y) {
  const int lane = threadIdx.x % 32;
  const int64_t batches = (m + kBatch - 1) / kBatch;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
       n < layer.out * batches; n += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t r = n / batches, b0 = n % batches * kBatch, size = min(int64_t{kBatch}, m - b0);
    float sum[kBatch] = {};
    SparseEntries(layer, r).each(lane, 32, [&](int64_t c, float v) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
        if (b < size) sum[b] = add(sum[b], mul(v, widen(x[(b0 + b) * layer.in + c])));
    });
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const float all = warp_sum(sum[b]);
      if (lane == 0 && b < size) y[(b0 + b) * layer.out + r] = mul(all, layer.params[0][r]);
    }
  }
}

cudaError_t linear(const LayerView& layer, const void* x, Type type, int64_t m, float* y, void*,
                   cudaStream_t stream) {
  const int64_t batches = (m + kBatch - 1) / kBatch;
  return with_type(type, [&](auto t) {
    using T = decltype(t);
    return run(linear_kernel<T>, blocks_for(layer.out * batches, kWarps), kLoopThreads, 0, stream,
               layer, static_cast<const T*>(x), m, y);
  });
}

}  // namespace

CudaRow sparse_row(const Term&) {
  CudaRow row;
  row.decode = decode;
  row.adjoint = adjoint;
  row.linear = linear;
  row.linear_max_m = 64;  // beyond, a product with the decoded matrix touches x less often
  return row;
}

}  // namespace rs::cuda
