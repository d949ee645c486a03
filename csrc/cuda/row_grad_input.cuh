// dx = dy @ T straight from the codes, for codecs whose rows are runs of codes one after the other:
// eight neighbours at a time are decoded by the codec's own member, as in panel.cuh, and rounded
// once; a register of an mma operand takes one column of two rows.
#pragma once

#include "panel.cuh"
#include "row_product.cuh"

namespace rs::cuda {

constexpr int kGradAcross = 4,
              kGradDeep = 2;  // warps of a block: side by side, and one below another
constexpr int kGradColumns = 64, kGradRows = 16;  // of T that a warp takes at a time

// N: rows of dy in eights; Bytes: of a run.
template <int N, int Bytes>
struct GradPlan {
  static constexpr int kBatch = N;
  static constexpr int kBlocks = N <= 2 ? 2 : 1;     // of a multiprocessor
  static constexpr int kAhead = Bytes == 8 ? 1 : 2;  // steps whose codes are read together
  static constexpr int kSums = 16 * N;
  static constexpr int kSharedBytes = kGradAcross * (kGradDeep - 1) * 32 * kSums * 4;
};

struct RowGradInput {
  const void* dy;  // (m, out)
  int m;
  bool whole_rows;  // fours of dy can be read at once
  int steps;        // of a warp
  float* dx;        // (splits, m, in)
};

// The bytes of one run, of which `left` belong to the row where Broken runs are possible.
template <int Bytes, bool Broken>
__device__ __forceinline__ RunBytes<Bytes> load_run(const uint8_t* at, int left) {
  using Read = std::conditional_t<Bytes == 8, uint2,
                                  std::conditional_t<Bytes == 4, uint32_t, RunBytes<Bytes>>>;
  if constexpr (!Broken) {
    return std::bit_cast<RunBytes<Bytes>>(*reinterpret_cast<const Read*>(at));
  } else {
    RunBytes<Bytes> run{};
#pragma unroll
    for (int i = 0; i < Bytes; ++i)
      if (i < left) run.at[i] = at[i];
    return run;
  }
}

template <class Codec, int Bytes, class Tables>
__device__ __forceinline__ void decode_run(const RunBytes<Bytes>& run, int64_t row, int64_t tile,
                                           const Tables& tables, float (&w)[8]) {
#pragma unroll
  for (int k = 0; k < 8; k += Codec::kUnit)
    Codec::decode(run.at, row, tile, k / Codec::kUnit, tables, w + k);
}

// Four neighbours of a row of dy as two pairs; zeros behind the `last`.
template <class T>
__device__ __forceinline__ uint2 load_four(const T* row, int at, int last, bool whole) {
  if (whole) return at <= last ? *reinterpret_cast<const uint2*>(row + at) : make_uint2(0, 0);
  uint32_t v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = at + i <= last ? row[at + i].bits : 0;
  return make_uint2(v[0] | v[1] << 16, v[2] | v[3] << 16);
}

// A block owns 256 columns of T and one of gridDim.y parts of its rows, a warp 64 of the columns
// and every second 16 rows, a lane eight columns of four of these; codes and scales are read once.
// The warps' sums are added in the order of their rows. Rows behind the last are the last, times
// zero.
template <class Codec, int Bytes, bool Broken, class T, class P>
__global__ void __launch_bounds__(kProductThreads, P::kBlocks)
    row_grad_input_kernel(LayerView layer, RowGradInput product) {
  constexpr int N = P::kBatch, kStep = kGradDeep * kGradRows;
  static_assert(kProductWarps == kGradAcross * kGradDeep && kGradDeep == 2);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int across = warp % kGradAcross, depth = warp / kGradAcross;
  const int64_t column =
      (static_cast<int64_t>(blockIdx.x) * kGradAcross + across) * kGradColumns + 8 * g;
  const bool inside = column < layer.in;
  const int64_t run = inside ? column / 8 : 0, tile = run * 8 / layer.tile.cols;
  const int64_t row_bytes = layer.tile_cols() * layer.tile.bytes;
  const int left = static_cast<int>(min(row_bytes - run * Bytes, int64_t{Bytes}));
  const auto stride = static_cast<uint32_t>(row_bytes);
  const uint8_t* codes = layer.codes + run * Bytes;
  decltype(auto) tables = tables_of<Codec>(layer);
  const T* dy = static_cast<const T*>(product.dy) + g * layer.out;
  const int last = static_cast<int>(layer.out) - 1;
  int row = (static_cast<int>(blockIdx.y) * product.steps * kGradDeep + depth) * kGradRows + 4 * t;

  float sums[N][4][4] = {};
#pragma unroll 1
  for (int s = 0; s < product.steps; s += P::kAhead) {
    RunBytes<Bytes> runs[P::kAhead][4];
#pragma unroll
    for (int a = 0; a < P::kAhead; ++a)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto r = static_cast<uint32_t>(min(row + a * kStep + i, last));
        runs[a][i] = load_run<Bytes, Broken>(codes + static_cast<uint64_t>(r) * stride, left);
      }
#pragma unroll
    for (int a = 0; a < P::kAhead; ++a, row += kStep) {
      uint32_t w[8][2];  // of a column, rows 0 and 1, rows 2 and 3
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float pair[2][8];
#pragma unroll
        for (int i = 0; i < 2; ++i)
          decode_run<Codec>(runs[a][2 * h + i], min(row + 2 * h + i, last), tile, tables, pair[i]);
#pragma unroll
        for (int k = 0; k < 8; ++k) w[k][h] = pack_pair<T>(pair[0][k], pair[1][k]);
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
        uint2 b = make_uint2(0, 0);
        if (8 * n + g < product.m)
          b = load_four(dy + 8 * n * layer.out, row, last, product.whole_rows);
#pragma unroll
        for (int p = 0; p < 4; ++p)
          mma_16x8x16<T>(sums[n][p], {w[2 * p][0], w[2 * p + 1][0], w[2 * p][1], w[2 * p + 1][1]},
                         b.x, b.y);
      }
    }
  }

  float* parts = dynamic_shared<float>() + across * P::kSums * 32 + lane;
  if (depth > 0)
#pragma unroll
    for (int i = 0; i < P::kSums; ++i) parts[i * 32] = sums[i / 16][i / 4 % 4][i % 4];
  __syncthreads();
  if (depth > 0 || !inside) return;
  float* dx = product.dx + static_cast<int64_t>(blockIdx.y) * product.m * layer.in + column;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int batch = 8 * n + 2 * t + j;
      if (batch >= product.m) continue;
      float v[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const int i = 16 * n + k / 2 * 4 + k % 2 * 2 + j;
        v[k] = sums[n][k / 2][k % 2 * 2 + j] + parts[i * 32];
      }
      float* to = dx + batch * layer.in;
      if constexpr (!Broken) {
        reinterpret_cast<float4*>(to)[0] = make_float4(v[0], v[1], v[2], v[3]);
        reinterpret_cast<float4*>(to)[1] = make_float4(v[4], v[5], v[6], v[7]);
      } else {
#pragma unroll
        for (int k = 0; k < 8; ++k)
          if (column + k < layer.in) to[k] = v[k];
      }
    }
}

template <int Bytes, class Visit>
auto with_grad_plan(int64_t m, Visit&& visit) {
  if (m <= 8) return visit(GradPlan<1, Bytes>{});
  if (m <= 16) return visit(GradPlan<2, Bytes>{});
  if (m <= 32) return visit(GradPlan<4, Bytes>{});
  return visit(GradPlan<8, Bytes>{});
}

// How the rows of T are split between blocks, so that there are enough of these.
template <class P>
Splits grad_splits_of(const LayerView& layer) {
  constexpr int64_t kWidth = kGradAcross * kGradColumns;
  const int64_t blocks = (layer.in + kWidth - 1) / kWidth;
  const int64_t steps = (layer.out + kGradRows * kGradDeep - 1) / (kGradRows * kGradDeep);
  const int64_t wanted = std::clamp<int64_t>(P::kBlocks * processors() / blocks, 1,
                                             std::max<int64_t>(1, steps / P::kAhead));
  const int64_t each = round_up((steps + wanted - 1) / wanted, P::kAhead);
  return {blocks, each, (steps + each - 1) / each};
}

template <int Bytes>
int64_t row_grad_input_scratch(const LayerView& layer, int64_t m) {
  return with_grad_plan<Bytes>(m, [&](auto plan) {
    const int64_t count = grad_splits_of<decltype(plan)>(layer).count;
    return count > 1 ? count * m * layer.in * static_cast<int64_t>(sizeof(float)) : int64_t{0};
  });
}

template <class Codec, int Bytes, bool Broken, class T>
cudaError_t row_grad_input(const LayerView& layer, const void* dy, int64_t m, float* dx,
                           void* scratch, cudaStream_t stream) {
  return with_grad_plan<Bytes>(m, [&](auto plan) {
    using P = decltype(plan);
    const Splits splits = grad_splits_of<P>(layer);
    RowGradInput product;
    product.dy = dy;
    product.m = static_cast<int>(m);
    product.whole_rows = copy_width(dy, layer.out * 2) >= 8;
    product.steps = static_cast<int>(splits.steps);
    product.dx = splits.count > 1 ? static_cast<float*>(scratch) : dx;
    const dim3 grid(static_cast<unsigned>(splits.blocks), static_cast<unsigned>(splits.count));
    const cudaError_t error = run(row_grad_input_kernel<Codec, Bytes, Broken, T, P>, grid,
                                  kProductThreads, P::kSharedBytes, stream, layer, product);
    if (error != cudaSuccess || splits.count == 1) return error;
    const int64_t count = m * layer.in;
    return run(add_splits_kernel<int64_t>, blocks_for(count, kLoopThreads), kLoopThreads, 0, stream,
               static_cast<const float*>(scratch), static_cast<int>(splits.count), count, dx);
  });
}

template <class Codec, int Bytes, bool Breaks, class T>
cudaError_t row_grad_input_of(const LayerView& layer, const void* dy, int64_t m, float* dx,
                              void* scratch, cudaStream_t stream) {
  if constexpr (Breaks)
    if (layer.in % 8)
      return row_grad_input<Codec, Bytes, true, T>(layer, dy, m, dx, scratch, stream);
  return row_grad_input<Codec, Bytes, false, T>(layer, dy, m, dx, scratch, stream);
}

// Puts the product into a row's slot, for runs of `Bytes` bytes. Breaks: a row may end within one.
template <class Codec, int Bytes, bool Breaks = false>
void row_grad_input_slot(CudaRow& row) {
  row.grad_input = [](const LayerView& layer, const void* dy, Type type, int64_t m, float* dx,
                      void* scratch, cudaStream_t stream) {
    const auto product = type == Type::float16 ? row_grad_input_of<Codec, Bytes, Breaks, Fp16>
                                               : row_grad_input_of<Codec, Bytes, Breaks, Bf16>;
    return product(layer, dy, m, dx, scratch, stream);
  };
  row.grad_input_scratch = row_grad_input_scratch<Bytes>;
  row.grad_input_max_m = kProductMaxRows;
}

}  // namespace rs::cuda
