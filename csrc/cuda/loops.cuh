// decode and adjoint as kernels over a codec's units: the loops of cpu/loops.h, over the same
// members of the same codec structs. Every fast slot is tested against these.
#pragma once

#include <algorithm>

#include "grid.cuh"
#include "row.h"

namespace rs::cuda {

constexpr int kLoopThreads = 256;
constexpr int64_t kMostBlocks = int64_t{1} << 30;

inline unsigned blocks_for(int64_t work, int64_t each) {
  return static_cast<unsigned>(std::clamp<int64_t>((work + each - 1) / each, 1, kMostBlocks));
}

// Tables that are a few numbers and pointers are made by every thread; larger ones are in
// LayerView::tables.
template <class Codec>
constexpr bool kTablesInMemory = sizeof(typename Codec::Tables) > 64;

template <class Codec>
__device__ __forceinline__ decltype(auto) tables_of(const LayerView& layer) {
  if constexpr (kTablesInMemory<Codec>)
    return *static_cast<const typename Codec::Tables*>(layer.tables);
  else
    return typename Codec::Tables(layer);
}

// A thread owns one unit at a time, neighbours in a row neighbouring ones: a unit's code and its
// tables are read, its weights written once.
template <class Codec, class T>
__global__ void __launch_bounds__(kLoopThreads)
    decode_kernel(LayerView layer, TileRange range, T* __restrict__ w, int64_t stride) {
  const auto [rows, cols, bytes] = layer.tile;
  decltype(auto) tables = tables_of<Codec>(layer);
  const int64_t width = (range.col1 - range.col0) * cols, units = width / Codec::kUnit;
  const int64_t count = (range.row1 - range.row0) * rows * units;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kLoopThreads + threadIdx.x; n < count;
       n += static_cast<int64_t>(gridDim.x) * kLoopThreads) {
    const int64_t i = n / units, j = n % units * Codec::kUnit;
    const int64_t tr = range.row0 + i / rows, tc = range.col0 + j / cols;
    const uint8_t* tile = layer.codes + (tr * layer.tile_cols() + tc) * bytes;
    float value[Codec::kUnit];
    Codec::decode(tile, tr, tc, static_cast<int>((i % rows * cols + j % cols) / Codec::kUnit),
                  tables, value);
    for (int k = 0; k < Codec::kUnit; ++k) w[i * stride + j + k] = narrow<T>(value[k]);
  }
}

template <class Codec>
cudaError_t decode_loop(const LayerView& layer, TileRange range, void* w, int64_t stride, Type type,
                        cudaStream_t stream) {
  const int64_t weights =
      (range.row1 - range.row0) * (range.col1 - range.col0) * layer.tile.rows * layer.tile.cols;
  return with_type(type, [&](auto t) {
    using T = decltype(t);
    return run(decode_kernel<Codec, T>, blocks_for(weights / Codec::kUnit, kLoopThreads),
               kLoopThreads, 0, stream, layer, range, static_cast<T*>(w), stride);
  });
}

// Shared sums are of integers, so that their order changes nothing: a term counts in steps of a
// power of two, rounded to the nearest, so small that `terms` terms of the largest size fit.
using Sum = unsigned long long;  // two's complement

// What a term is times, for terms up to gain * largest: two powers of two, since their product may
// be past float32's range. Zeros where something is not finite.
struct SumScale {
  float first;
  double second;
};
__device__ __forceinline__ SumScale sum_scale(float largest, int gain, int64_t terms) {
  const uint32_t exponent = std::bit_cast<uint32_t>(largest * static_cast<float>(gain)) >> 23;
  if (exponent >= 255) return {0.0f, 0.0};
  int bits = 62;
  for (; terms > 0; terms >>= 1) --bits;
  // largest * gain < 2^(exponent - 126)
  const int power = 126 - static_cast<int>(exponent) + min(bits, 40), half = power / 2;
  return {std::bit_cast<float>(static_cast<uint32_t>(127 + half) << 23),
          std::bit_cast<double>(static_cast<uint64_t>(1023 + power - half) << 52)};
}

struct DeviceSums {
  Sum* sum;
  float* grads[kMostParams];
  SumScale scale;
  int64_t last;  // sum: of the thread until it is done, since to some every unit adds
  Sum of_last = 0;

  __device__ void shared(int64_t i, float v) {
    const double steps = static_cast<double>(v * scale.first) * scale.second;
    const auto whole = static_cast<Sum>(__double2ll_rn(steps));
    if (i == last)
      of_last += whole;
    else
      atomicAdd(sum + i, whole);
  }
  __device__ void own(int param, int64_t i, float v) {
    if (grads[param]) grads[param][i] += v;
  }
};

struct Grads {
  float* of[kMostParams];
};
inline Grads grads_of(float* const* grads) {
  Grads all{};
  for (int i = 0; i < kMostParams; ++i) all.of[i] = grads[i];
  return all;
}

// A thread owns one tile at a time: entries that are the tile's own need no order but the loop's.
template <class Codec>
__global__ void __launch_bounds__(kLoopThreads)
    own_adjoint_kernel(LayerView layer, int64_t row0, int64_t row1, const float* __restrict__ dw,
                       Grads grads) {
  const auto [rows, cols, bytes] = layer.tile;
  decltype(auto) tables = tables_of<Codec>(layer);
  DeviceSums sums{};
  for (int p = 0; p < kMostParams; ++p) sums.grads[p] = grads.of[p];
  const int64_t count = (row1 - row0) * layer.tile_cols();
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kLoopThreads + threadIdx.x; n < count;
       n += static_cast<int64_t>(gridDim.x) * kLoopThreads) {
    const int64_t tr = row0 + n / layer.tile_cols(), tc = n % layer.tile_cols();
    const uint8_t* tile = layer.codes + (tr * layer.tile_cols() + tc) * bytes;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; j += Codec::kUnit)
        Codec::adjoint(tile, tr, tc, static_cast<int>((i * cols + j) / Codec::kUnit), tables,
                       dw + ((tr - row0) * rows + i) * layer.in + tc * cols + j, sums);
  }
}

// How many sums the gradients of shared params gather in, and how many entries those have. Codecs
// whose params' sizes are a setting say it of a layer, the same for both.
struct SharedCounts {
  int64_t sums, folds;
};
template <class Codec>
concept SizedSums = requires(const LayerView& layer) { Codec::sums(layer); };
template <class Codec>
__host__ __device__ __forceinline__ SharedCounts shared_counts(const LayerView& layer) {
  if constexpr (SizedSums<Codec>) {
    const int64_t sums = Codec::sums(layer);
    return {sums, sums};
  } else {
    return {Codec::kSums, Codec::kFolds};
  }
}
template <class Codec>
constexpr bool kSharesSums = [] {
  if constexpr (SizedSums<Codec>)
    return true;
  else
    return Codec::kSums > 0;
}();

constexpr int64_t kMostCopiedSums = 6144;  // of 48 KB; more go to memory at once

// A block owns every gridDim-th stretch of units and, where Copied, its own copy of the shared
// sums, a thread one unit of a stretch; the copies are added up at the end.
template <class Codec, bool Copied>
__global__ void __launch_bounds__(kLoopThreads)
    shared_adjoint_kernel(LayerView layer, int64_t row0, int64_t row1, const float* __restrict__ dw,
                          const float* __restrict__ largest, Sum* __restrict__ all) {
  Sum* sum = Copied ? dynamic_shared<Sum>() : all;
  const int64_t n_sums = shared_counts<Codec>(layer).sums;
  const auto [rows, cols, bytes] = layer.tile;
  decltype(auto) tables = tables_of<Codec>(layer);
  if constexpr (Copied) {
    for (int i = threadIdx.x; i < n_sums; i += kLoopThreads) sum[i] = 0;
    __syncthreads();
  }
  const int64_t units = layer.in / Codec::kUnit, count = (row1 - row0) * rows * units;
  DeviceSums sums{sum, {}, sum_scale(*largest, Codec::kGain, count * Codec::kUnit), n_sums - 1};
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kLoopThreads + threadIdx.x; n < count;
       n += static_cast<int64_t>(gridDim.x) * kLoopThreads) {
    const int64_t i = n / units, j = n % units * Codec::kUnit;
    const int64_t tr = row0 + i / rows, tc = j / cols;
    const uint8_t* tile = layer.codes + (tr * layer.tile_cols() + tc) * bytes;
    Codec::adjoint(tile, tr, tc, static_cast<int>((i % rows * cols + j % cols) / Codec::kUnit),
                   tables, dw + i * layer.in + j, sums);
  }
  if (sums.of_last) atomicAdd(sum + sums.last, sums.of_last);
  if constexpr (Copied) {
    __syncthreads();
    for (int i = threadIdx.x; i < n_sums; i += kLoopThreads)
      if (sum[i]) atomicAdd(all + i, sum[i]);
  }
}

// Scratch of a gradient: the sums of one call, then those of all calls in float64.
inline int64_t sum_bytes(int64_t sums) { return sums * int64_t{sizeof(Sum) + sizeof(double)}; }
inline double* all_sums(void* scratch, int64_t sums) {
  return reinterpret_cast<double*>(static_cast<Sum*>(scratch) + sums);
}
inline const double* all_sums(const void* scratch, int64_t sums) {
  return reinterpret_cast<const double*>(static_cast<const Sum*>(scratch) + sums);
}

// A thread owns one sum at a time: adds the call's to all calls' and clears it. Not finite: NaN.
template <int Gain>
__global__ void __launch_bounds__(kLoopThreads)
    collect_sums_kernel(const float* __restrict__ largest, int64_t terms, int64_t sums,
                        Sum* __restrict__ call, double* __restrict__ all) {
  const SumScale scale = sum_scale(*largest, Gain, terms);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kLoopThreads + threadIdx.x; i < sums;
       i += static_cast<int64_t>(gridDim.x) * kLoopThreads) {
    const double steps = static_cast<double>(static_cast<long long>(call[i]));
    call[i] = 0;
    all[i] += scale.second != 0 ? steps / scale.second / static_cast<double>(scale.first)
                                : std::bit_cast<double>(uint64_t{0x7FF8} << 48);
  }
}
template <class Codec>
cudaError_t collect_sums(const float* largest, int64_t terms, int64_t sums, void* scratch,
                         cudaStream_t stream) {
  return run(collect_sums_kernel<Codec::kGain>, blocks_for(sums, kLoopThreads), kLoopThreads, 0,
             stream, largest, terms, sums, static_cast<Sum*>(scratch), all_sums(scratch, sums));
}

template <class Codec>
cudaError_t adjoint_loop(const LayerView& layer, int64_t row0, int64_t row1, const float* dw,
                         const float* largest, void* sums, float* const* grads,
                         cudaStream_t stream) {
  const int64_t tiles = (row1 - row0) * layer.tile_cols();
  if constexpr (!kSharesSums<Codec>) {
    return run(own_adjoint_kernel<Codec>, blocks_for(tiles, kLoopThreads), kLoopThreads, 0, stream,
               layer, row0, row1, dw, grads_of(grads));
  } else {
    const int64_t weights = tiles * layer.tile.rows * layer.tile.cols,
                  count = shared_counts<Codec>(layer).sums;
    const unsigned blocks = std::min(blocks_for(weights / Codec::kUnit, kLoopThreads),
                                     static_cast<unsigned>(4 * processors()));
    const auto add = [&](auto kernel, SharedBytes shared) {
      return run(kernel, blocks, kLoopThreads, shared, stream, layer, row0, row1, dw, largest,
                 static_cast<Sum*>(sums));
    };
    const SharedBytes copied(static_cast<size_t>(count) * sizeof(Sum),
                             kMostCopiedSums * sizeof(Sum));
    cudaError_t error;
    if constexpr (SizedSums<Codec>) {
      error = count <= kMostCopiedSums ? add(shared_adjoint_kernel<Codec, true>, copied)
                                       : add(shared_adjoint_kernel<Codec, false>, 0);
    } else {
      static_assert(Codec::kSums <= kMostCopiedSums);
      error = add(shared_adjoint_kernel<Codec, true>, copied);
    }
    return error != cudaSuccess ? error
                                : collect_sums<Codec>(largest, weights, count, sums, stream);
  }
}

// A thread owns one entry of a shared param at a time.
template <class Codec>
__global__ void __launch_bounds__(kLoopThreads)
    fold_kernel(LayerView layer, const double* __restrict__ sums, Grads grads) {
  decltype(auto) tables = tables_of<Codec>(layer);
  const int64_t folds = shared_counts<Codec>(layer).folds;
  for (int64_t f = static_cast<int64_t>(blockIdx.x) * kLoopThreads + threadIdx.x; f < folds;
       f += static_cast<int64_t>(gridDim.x) * kLoopThreads)
    Codec::fold(static_cast<int>(f), tables, sums, grads.of);
}

template <class Codec>
cudaError_t finish_loop(const LayerView& layer, const void* sums, float* const* grads,
                        cudaStream_t stream) {
  const SharedCounts count = shared_counts<Codec>(layer);
  return run(fold_kernel<Codec>, blocks_for(count.folds, kLoopThreads), kLoopThreads, 0, stream,
             layer, all_sums(sums, count.sums), grads_of(grads));
}

// The loops in a row's slots. Codecs with sums(layer) say how many that is.
template <class Codec>
CudaRow loop_row(int64_t sums = 0) {
  CudaRow row;
  row.decode = decode_loop<Codec>;
  row.adjoint = adjoint_loop<Codec>;
  if constexpr (kSharesSums<Codec>) {
    if constexpr (!SizedSums<Codec>) sums = Codec::kSums;
    row.sum_bytes = sum_bytes(sums);
    row.finish = finish_loop<Codec>;
  }
  return row;
}

}  // namespace rs::cuda
