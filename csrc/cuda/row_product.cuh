// y = x @ T^T straight from the codes, for codecs whose rows are runs of codes one after the other:
// written once over a Decoder, which turns the codes of kRun neighbours of a row into pairs.
//
//   struct Decoder<T> {
//     kRun, kRunBytes   weights that one lane decodes at a time, a multiple of 8, and their bytes
//     kRead             bytes of its widest read of shared memory
//     kScales           0, or 1 for a scale, or 2 for a scale and a zero, of each group of a row
//     kTableBytes       of shared memory, filled by the block before all else
//     fill(layer, table), Decoder(layer, table)
//     decode(strip, t, pairs)  run t of four: kRun / 2 pairs in the Decoder's own order
//     arrange(x)               eight activations in that order
//     kShift                   with scales: weight = scale * (decoded + kShift - zero)
//   };
//
// A step of `mma` sums over 16 columns of a row in whatever order they come, as long as weights and
// activations agree: so a lane's registers are the codes it read, and nothing moves between lanes.
// Weights are exact integers before their group's scale, or rounded once to T; sums are float32.
#pragma once

#include <algorithm>
#include <cstring>

#include "loops.cuh"
#include "pairs.cuh"
#include "row_ring.cuh"

namespace rs::cuda {

// part += w @ x^T for the kRun neighbours of each of two times eight kTiles rows; x_sums += those
// of x.
template <class P, class T>
__device__ __forceinline__ void multiply(const uint32_t (&w)[P::kTiles][2][P::Decoder::kRun / 2],
                                         const unsigned char* x, float (&part)[P::kTiles][4],
                                         float (&x_sums)[4]) {
  using Decoder = typename P::Decoder;
#pragma unroll
  for (int p = 0; p < Decoder::kRun / 8; ++p) {
    const uint4 v = Decoder::arrange(*reinterpret_cast<const uint4*>(x + 16 * p));
#pragma unroll
    for (int i = 0; i < P::kTiles; ++i) {
      const auto& [a, b] = w[i];
      mma_16x8x16<T>(part[i], {a[4 * p], b[4 * p], a[4 * p + 1], b[4 * p + 1]}, v.x, v.y);
      mma_16x8x16<T>(part[i], {a[4 * p + 2], b[4 * p + 2], a[4 * p + 3], b[4 * p + 3]}, v.z, v.w);
    }
    if constexpr (P::kShifted) {
      const uint32_t one = pair_of<T>(1.0f), ones[4] = {one, one, one, one};
      mma_16x8x16<T>(x_sums, ones, v.x, v.y);
      mma_16x8x16<T>(x_sums, ones, v.z, v.w);
    }
  }
}

// sums += scale * (part + shift * x_sums), with the scales of a strip from row g's on.
template <class P>
__device__ __forceinline__ void add_group(const float* scales, const float (&part)[P::kTiles][4],
                                          const float (&x_sums)[4], float (&sums)[P::kTiles][4]) {
  using Decoder = typename P::Decoder;
#pragma unroll
  for (int i = 0; i < 2 * P::kTiles; ++i) {
    const float scale = scales[8 * P::kSlots * i];
    float shift = Decoder::kShift;
    if constexpr (Decoder::kScales == 2) shift -= scales[(8 * i + P::kRows) * P::kSlots];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int at = i % 2 * 2 + c;
      const float v = P::kShifted ? fmaf(shift, x_sums[c], part[i / 2][at]) : part[i / 2][at];
      sums[i / 2][at] = fmaf(scale, v, sums[i / 2][at]);
    }
  }
}

// Adds the product of one stage.
template <class P, class T>
__device__ __forceinline__ void add_stage(const Ring<P>& ring, int stage,
                                          const typename P::Decoder& decoder,
                                          float (&sums)[P::kColumns][P::kTiles][4]) {
  using Decoder = typename P::Decoder;
  const int g = ring.lane / 4, t = ring.lane % 4;
  const unsigned char* codes = ring.codes(stage) + g * P::kPitch;
  const unsigned char* x = ring.x(stage) + t * Decoder::kRun * 2;
  const float* scales = ring.scales(stage) + g * P::kSlots;
  float part[P::kTiles][4] = {}, x_sums[4] = {};
#pragma unroll P::kColumns == 1 ? P::kStrips : 1  // more would spill registers
  for (int strip = 0; strip < P::kStrips; ++strip) {
    uint32_t w[P::kTiles][2][Decoder::kRun / 2];
#pragma unroll
    for (int i = 0; i < 2 * P::kTiles; ++i)
      decoder.decode(codes + 8 * i * P::kPitch + strip * 4 * Decoder::kRunBytes, t,
                     w[i / 2][i % 2]);
#pragma unroll
    for (int n = 0; n < P::kColumns; ++n) {
      // Rows past the last give columns of the product that nobody stores.
      const unsigned char* row =
          x + min(8 * n + g, ring.product.m - 1) * P::kXPitch + strip * P::kStrip * 2;
      if constexpr (Decoder::kScales == 0) {
        multiply<P, T>(w, row, sums[n], x_sums);
      } else {
        multiply<P, T>(w, row, part, x_sums);
        if ((strip + 1) % P::kHold == 0) {
          add_group<P>(scales + strip / P::kHold, part, x_sums, sums[n]);
          std::memset(part, 0, sizeof part);
          std::memset(x_sums, 0, sizeof x_sums);
        }
      }
    }
  }
}

// A block owns kBlockRows rows of T and one of gridDim.y parts of its columns, a warp a part of
// both, chunk by chunk; codes and scales are read once, x once per block. Warps' sums are added in
// the order of their columns.
template <class P, class T>
__global__ void __launch_bounds__(kProductThreads, P::kBlocks)
    row_product_kernel(LayerView layer, RowProduct product) {
  using Decoder = typename P::Decoder;
  unsigned char* shared = dynamic_shared<unsigned char>();
  auto* table = reinterpret_cast<uint32_t*>(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if constexpr (Decoder::kTableBytes > 0) {
    Decoder::fill(layer, table);
    __syncthreads();
  }
  const Decoder decoder(layer, table);
  const int row_warp = warp % P::kRowWarps, depth = warp / P::kRowWarps;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * P::kBlockRows + row_warp * P::kRows;
  const int64_t code_row = row0 + lane / P::kPieces, scale_row = row0 + lane / P::kSlots;
  const Ring<P> ring{layer,
                     product,
                     shared + Decoder::kTableBytes,
                     P::stage_bytes(product.m),
                     warp,
                     lane,
                     depth,
                     row_warp,
                     row0,
                     code_row * product.row_bytes + lane % P::kPieces * 16,
                     scale_row * product.groups};
  const int steps = static_cast<int>(product.steps);
  const int64_t chunk = static_cast<int64_t>(blockIdx.y) * steps * P::kDepths + depth;

  for (int s = 0; s < P::kStages - 1; ++s) {
    if (s < steps) ring.load(chunk + s * P::kDepths, s);
    commit_copies();
  }
  float sums[P::kColumns][P::kTiles][4] = {};
  int stage = 0, free = P::kStages - 1;
#pragma unroll 1
  for (int s = 0; s < steps; ++s) {
    ring.wait();
    if (s + P::kStages - 1 < steps) ring.load(chunk + (s + P::kStages - 1) * P::kDepths, free);
    commit_copies();
    add_stage<P, T>(ring, stage, decoder, sums);
    free = stage;
    stage = stage + 1 == P::kStages ? 0 : stage + 1;
  }

  wait_copies<0>();
  __syncthreads();
  float* parts = reinterpret_cast<float*>(shared + Decoder::kTableBytes);
  if (depth > 0)
#pragma unroll
    for (int i = 0; i < P::kSums; ++i)
      parts[(warp * P::kSums + i) * 32 + lane] = sums[i / 4 / P::kTiles][i / 4 % P::kTiles][i % 4];
  __syncthreads();
  if (depth > 0) return;
  float* y = product.y + static_cast<int64_t>(blockIdx.y) * product.m * layer.out;
#pragma unroll
  for (int i = 0; i < P::kSums; ++i) {
    float sum = sums[i / 4 / P::kTiles][i / 4 % P::kTiles][i % 4];
    for (int d = 1; d < P::kDepths; ++d)
      sum += parts[((d * P::kRowWarps + warp) * P::kSums + i) * 32 + lane];
    const int64_t row = row0 + i / 4 % P::kTiles * 16 + i % 4 / 2 * 8 + lane / 4;
    const int column = i / 4 / P::kTiles * 8 + lane % 4 * 2 + i % 2;
    if (row < layer.out && column < product.m) y[column * layer.out + row] = sum;
  }
}

// A thread owns one value of y: the sum of its parts in their order.
template <class Count>
__global__ void __launch_bounds__(kLoopThreads)
    add_splits_kernel(const float* __restrict__ parts, int splits, Count count,
                      float* __restrict__ y) {
  const Count i = static_cast<Count>(blockIdx.x) * kLoopThreads + threadIdx.x;
  if (i >= count) return;
  float sum = parts[i];
  for (int s = 1; s < splits; ++s) sum += parts[s * count + i];
  y[i] = sum;
}

// Calls visit(Plan{}) with the plan for m rows of x and groups of `group` columns. Two tiles to a
// warp halve what activations cost, where the registers hold them.
template <class Decoder, int Hold, class Visit>
auto with_narrow_plan(int64_t m, Visit&& visit) {
  if constexpr (Decoder::kTableBytes <= 8192)
    if (m <= 2) return visit(Plan<Decoder, 1, 1, 1, Hold>{});
  return visit(Plan<Decoder, 1, 1, 4, Hold>{});
}
template <class Decoder, class Visit>
auto with_plan(int64_t m, int64_t group, Visit&& visit) {
  constexpr int kTwo = Decoder::kRun == 8 ? 2 : 1;
  if constexpr (Decoder::kScales > 0)
    if (m <= 8 && group % 64 == 0) return with_narrow_plan<Decoder, 2>(m, visit);
  if (m <= 8) return with_narrow_plan<Decoder, 1>(m, visit);
  if (m <= 16) return visit(Plan<Decoder, kTwo, 2, 4>{});
  if (m <= 32) return visit(Plan<Decoder, kTwo, 4, 4>{});
  return visit(Plan<Decoder, Decoder::kRunBytes == 8 ? 1 : kTwo, 8, 4>{});
}

// How the columns of T are split between blocks, so that there are enough of these.
struct Splits {
  int64_t blocks, steps, count;
};
template <class P>
Splits splits_of(const LayerView& layer) {
  const int64_t blocks = (layer.out + P::kBlockRows - 1) / P::kBlockRows;
  constexpr int64_t kStep = P::kChunk * P::kDepths, kFewest = 4;
  const int64_t steps = (layer.in + kStep - 1) / kStep;
  const int64_t wanted = std::clamp<int64_t>(P::kBlocks * processors() / blocks, 1,
                                             std::max<int64_t>(1, steps / kFewest));
  const int64_t each = (steps + wanted - 1) / wanted;
  return {blocks, each, (steps + each - 1) / each};
}

template <class Decoder>
int64_t row_product_scratch(const LayerView& layer, int64_t m) {
  return with_plan<Decoder>(m, layer.tile.cols, [&](auto plan) {
    const int64_t count = splits_of<decltype(plan)>(layer).count;
    return count > 1 ? count * m * layer.out * static_cast<int64_t>(sizeof(float)) : int64_t{0};
  });
}

template <class Decoder, class T>
cudaError_t row_product(const LayerView& layer, const void* x, int64_t m, float* y, void* scratch,
                        cudaStream_t stream) {
  return with_plan<Decoder>(m, layer.tile.cols, [&](auto plan) {
    using P = decltype(plan);
    const Splits splits = splits_of<P>(layer);
    RowProduct product;
    product.row_bytes = layer.tile_cols() * layer.tile.bytes;
    product.x = x;
    product.m = static_cast<int>(m);
    product.codes_width = copy_width(layer.codes, product.row_bytes);
    product.x_width = copy_width(x, layer.in * 2);
    product.groups = layer.tile_cols();
    product.group = static_cast<uint32_t>(layer.tile.cols);
    product.group_shift = std::has_single_bit(product.group) ? std::countr_zero(product.group) : -1;
    product.steps = splits.steps;
    product.y = splits.count > 1 ? static_cast<float*>(scratch) : y;
    const dim3 grid(static_cast<unsigned>(splits.blocks), static_cast<unsigned>(splits.count));
    const SharedBytes shared(P::shared_bytes(m), P::shared_bytes(P::kMaxRows));
    const cudaError_t error =
        run(row_product_kernel<P, T>, grid, kProductThreads, shared, stream, layer, product);
    if (error != cudaSuccess || splits.count == 1) return error;
    const int64_t count = m * layer.out;
    return run(add_splits_kernel<int64_t>, blocks_for(count, kLoopThreads), kLoopThreads, 0, stream,
               static_cast<const float*>(scratch), static_cast<int>(splits.count), count, y);
  });
}

// Puts the product into a row's slot. D is a Decoder over the storage type.
template <template <class> class D>
void row_product_slot(CudaRow& row) {
  row.linear = [](const LayerView& layer, const void* x, Type type, int64_t m, float* y,
                  void* scratch, cudaStream_t stream) {
    return type == Type::float16 ? row_product<D<Fp16>, Fp16>(layer, x, m, y, scratch, stream)
                                 : row_product<D<Bf16>, Bf16>(layer, x, m, y, scratch, stream);
  };
  row.linear_scratch = row_product_scratch<D<Bf16>>;
  row.linear_max_m = kProductMaxRows;
}

}  // namespace rs::cuda
