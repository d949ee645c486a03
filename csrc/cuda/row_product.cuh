// y = x @ T^T straight from the codes, for codecs whose rows are runs of codes one after the other:
// written once over a Decoder, which turns the codes of kRun neighbours of a row into pairs.
//
//   struct Decoder<T> {
//     kRun, kRunBytes   weights that one lane decodes at a time, a multiple of 8, and their bytes
//     kRead             bytes of its widest read of shared memory
//     kScales           0, or 1 for a scale, or 2 for a scale and a zero, of each group of a row
//     kTableBytes       of shared memory, filled by the block before all else
//     fill(layer, table), Decoder(layer, table)
//     decode(run, pairs)       kRun / 2 pairs in the Decoder's own order
//     arrange(x)               eight activations in that order
//     kMiddle                  with scales: weight = scale * (decoded + kMiddle - zero)
//   };
//
// A step of `mma` sums over 16 columns of a row in whatever order they come, as long as weights and
// activations agree: so a lane's registers are the codes it read, and nothing moves between lanes.
// Weights are exact integers before their group's scale, or rounded once to T; sums are float32.
#pragma once

#include <algorithm>

#include "loops.cuh"
#include "pairs.cuh"

namespace rs::cuda {

constexpr int kProductThreads = 256, kProductWarps = kProductThreads / 32;
constexpr int64_t kProductMaxRows = 64;  // of x

// An odd multiple of `unit`, so that eight rows start in different banks.
constexpr int odd_pitch(int bytes, int unit) { return ((bytes + unit - 1) / unit | 1) * unit; }

// A warp owns 16 Tiles rows of T and 8 Columns rows of x; RowWarps warps of a block stand side by
// side and share x, the others split the columns of T.
template <class Codec, int Tiles, int Columns, int RowWarps>
struct Plan {
  using Decoder = Codec;
  static constexpr int kTiles = Tiles, kColumns = Columns, kRowWarps = RowWarps;
  static constexpr int kDepths = kProductWarps / RowWarps;
  static constexpr int kRows = 16 * Tiles, kBlockRows = kRows * RowWarps;
  // Columns of T that four lanes decode at once; those that a warp takes at a time.
  static constexpr int kStrip = 4 * Codec::kRun, kStrips = kStrip < 128 ? 128 / kStrip : 1;
  static constexpr int kChunk = kStrip * kStrips;
  static constexpr int kChunkBytes = kChunk / Codec::kRun * Codec::kRunBytes;
  static constexpr int kPitch = odd_pitch(kChunkBytes, 4 * Codec::kRead);
  static constexpr int kXPitch = odd_pitch(2 * kChunk, 64);
  static constexpr int kScaleFloats = Codec::kScales * kRows * kStrips;  // of a warp
  static constexpr int kSums = Tiles * Columns * 4;

  // Shared memory: the table, then a ring of stages, each codes, scales and x.
  static constexpr int kCodesBytes = kProductWarps * kRows * kPitch;
  static constexpr int kScalesBytes = kProductWarps * kScaleFloats * 4;
  static constexpr int stage_bytes(int64_t m) {
    return kCodesBytes + kScalesBytes + kDepths * static_cast<int>(m) * kXPitch;
  }
  static constexpr int kBlocks = Columns <= 2 ? 2 : 1;  // of a multiprocessor
  static constexpr int kRoom = 226 * 1024 / kBlocks - 1024 - Codec::kTableBytes;
  static constexpr int kStages =
      std::clamp(kRoom / stage_bytes(RowWarps == 1 ? 2 : 8 * Columns), 2, 4);
  static constexpr int kSumBytes = kProductThreads * kSums * 4;
  static constexpr int shared_bytes(int64_t m) {
    return Codec::kTableBytes + std::max(kStages * stage_bytes(m), kSumBytes);
  }
  static_assert(Codec::kTableBytes + 2 * stage_bytes(RowWarps == 1 ? 2 : 8 * Columns) <=
                227 * 1024);
};

struct RowProduct {
  int64_t row_bytes;
  const void* x;  // (m, in)
  int m;
  int codes_width, x_width;  // bytes of one copy: see copy_piece
  int64_t groups;            // of a row
  uint32_t group;            // columns of one
  int group_shift;           // their logarithm, or -1
  int64_t steps;             // of a block
  float* y;                  // (splits, m, out)
};

// The widest copy for rows of `bytes` from `base` on.
inline int copy_width(const void* base, int64_t bytes) {
  const auto at = static_cast<int64_t>(reinterpret_cast<uintptr_t>(base)) | bytes;
  return at % 16 == 0 ? 16 : at % 8 == 0 ? 8 : at % 4 == 0 ? 4 : 1;
}

// Sixteen bytes to shared memory, those from `left` on as zeros, which are whole copies.
template <int Width>
__device__ __forceinline__ void copy_units(unsigned char* to, const unsigned char* from,
                                           int64_t left) {
  using Unit =
      std::conditional_t<Width == 16, uint4, std::conditional_t<Width == 8, uint2, uint32_t>>;
#pragma unroll
  for (int b = 0; b < 16; b += Width) {
    if (b < left)
      copy_async<Width>(to + b, from + b);
    else
      *reinterpret_cast<Unit*>(to + b) = Unit{};
  }
}
// Width 0: `width` is known at run time. Rows at odd addresses go through registers.
template <int Width>
__device__ __forceinline__ void copy_piece(unsigned char* to, const unsigned char* from,
                                           int64_t left, int width) {
  if constexpr (Width > 0)
    copy_units<Width>(to, from, left);
  else if (width == 16)
    copy_units<16>(to, from, left);
  else if (width == 8)
    copy_units<8>(to, from, left);
  else if (width == 4)
    copy_units<4>(to, from, left);
  else
    for (int b = 0; b < 16; ++b) to[b] = b < left ? from[b] : static_cast<unsigned char>(0);
}

// A warp's share of the ring: where its codes, scales and activations come from and stand.
template <class P>
struct Ring {
  using Decoder = typename P::Decoder;
  const LayerView& layer;
  const RowProduct& product;
  unsigned char* stages;
  int stage_bytes, warp, lane, depth, row_warp;
  int64_t row0;

  __device__ unsigned char* codes(int stage) const {
    return stages + stage * stage_bytes + warp * P::kRows * P::kPitch;
  }
  __device__ float* scales(int stage) const {
    return reinterpret_cast<float*>(stages + stage * stage_bytes + P::kCodesBytes) +
           warp * P::kScaleFloats;
  }
  __device__ unsigned char* x(int stage) const {
    return stages + stage * stage_bytes + P::kCodesBytes + P::kScalesBytes +
           depth * product.m * P::kXPitch;
  }

  // Starts the copies of one chunk of columns. Rows past the last are left as they are, for nobody
  // stores what they give.
  __device__ __forceinline__ void load(int64_t chunk, int stage) const {
    if (product.codes_width == 16 && product.x_width == 16)
      load_as<16>(chunk, stage);
    else
      load_as<0>(chunk, stage);
    if constexpr (Decoder::kScales > 0) load_scales(chunk, scales(stage));
  }
  template <int Width>
  __device__ __forceinline__ void load_as(int64_t chunk, int stage) const {
    constexpr int kPieces = P::kChunkBytes / 16, kAll = P::kRows * kPieces;
    constexpr int kUnroll = Width > 0 ? kAll : 1;
    unsigned char* to = codes(stage);
    const unsigned char* from = layer.codes + row0 * product.row_bytes;
    const int rows = static_cast<int>(min(layer.out - row0, int64_t{P::kRows}));
#pragma unroll kUnroll
    for (int first = 0; first < kAll; first += 32) {
      const int i = first + lane, r = i / kPieces, piece = i % kPieces;
      const int64_t at = chunk * P::kChunkBytes + piece * 16;
      if (r < rows)
        copy_piece<Width>(to + r * P::kPitch + piece * 16, from + r * product.row_bytes + at,
                          product.row_bytes - at, product.codes_width);
    }
    constexpr int kXPieces = P::kChunk / 8, kTeam = 32 * P::kRowWarps;
    to = x(stage);
    from = static_cast<const unsigned char*>(product.x);
#pragma unroll 1
    for (int i = row_warp * 32 + lane; i < product.m * kXPieces; i += kTeam) {
      const int r = i / kXPieces, piece = i % kXPieces;
      const int64_t at = (chunk * P::kChunk + piece * 8) * 2;
      copy_piece<Width>(to + r * P::kXPitch + piece * 16, from + r * layer.in * 2 + at,
                        layer.in * 2 - at, product.x_width);
    }
  }

  // Lane 4 g + j copies those of strip j of rows g, g + 8, ...
  __device__ __forceinline__ void load_scales(int64_t chunk, float* to) const {
    static_assert(P::kStrips == 4 || Decoder::kScales == 0);
    const int64_t column = chunk * P::kChunk + lane % 4 * P::kStrip;
    const int64_t group = product.group_shift >= 0 ? column >> product.group_shift
                                                   : static_cast<uint32_t>(column) / product.group;
    const int rows = static_cast<int>(min(layer.out - row0, int64_t{P::kRows}));
#pragma unroll
    for (int first = 0; first < P::kRows; first += 8) {
      const int r = first + lane / 4;
      const int64_t at = (row0 + r) * product.groups + group;
#pragma unroll
      for (int i = 0; i < Decoder::kScales; ++i) {
        float* scale = to + (i * P::kRows + r) * 4 + lane % 4;
        if (column >= layer.in)
          *scale = 0;
        else if (r < rows)
          copy_async<4>(scale, layer.params[i] + at);
      }
    }
  }

  // Waits for a stage, and for everyone who reads the same one.
  __device__ void wait() const {
    wait_copies<P::kStages - 2>();
    if constexpr (P::kRowWarps == 1)
      __syncwarp();
    else
      __syncthreads();
  }
};

// Adds the product of one stage.
template <class P, class T>
__device__ __forceinline__ void add_stage(const Ring<P>& ring, int stage,
                                          const typename P::Decoder& decoder,
                                          float (&sums)[P::kTiles][P::kColumns][4]) {
  using Decoder = typename P::Decoder;
  const int g = ring.lane / 4, t = ring.lane % 4;
  const unsigned char* codes = ring.codes(stage) + g * P::kPitch + t * Decoder::kRunBytes;
  const unsigned char* x = ring.x(stage) + t * Decoder::kRun * 2;
#pragma unroll P::kColumns == 1 ? P::kStrips : 1  // more would spill registers
  for (int strip = 0; strip < P::kStrips; ++strip) {
    uint32_t w[P::kTiles][2][Decoder::kRun / 2];
#pragma unroll
    for (int i = 0; i < 2 * P::kTiles; ++i)
      decoder.decode(codes + 8 * i * P::kPitch + strip * 4 * Decoder::kRunBytes, w[i / 2][i % 2]);
    float scale[2 * P::kTiles], shift[2 * P::kTiles];
    if constexpr (Decoder::kScales > 0) {
      const float* scales = ring.scales(stage) + g * 4 + strip;
#pragma unroll
      for (int i = 0; i < 2 * P::kTiles; ++i) {
        scale[i] = scales[32 * i];
        if constexpr (Decoder::kScales == 2)
          shift[i] = Decoder::kMiddle - scales[32 * i + 4 * P::kRows];
      }
    }
#pragma unroll
    for (int n = 0; n < P::kColumns; ++n) {
      // Rows past the last give columns of the product that nobody stores.
      const unsigned char* row = x + min(8 * n + g, ring.product.m - 1) * P::kXPitch;
      float part[P::kTiles][4] = {}, x_sums[4] = {};
#pragma unroll
      for (int p = 0; p < Decoder::kRun / 8; ++p) {
        const uint4 v = Decoder::arrange(
            *reinterpret_cast<const uint4*>(row + (strip * P::kStrip + p * 8) * 2));
#pragma unroll
        for (int i = 0; i < P::kTiles; ++i) {
          const auto& r = w[i];
          auto& d = Decoder::kScales > 0 ? part[i] : sums[i][n];
          mma_16x8x16<T>(d, {r[0][4 * p], r[1][4 * p], r[0][4 * p + 1], r[1][4 * p + 1]}, v.x, v.y);
          mma_16x8x16<T>(d, {r[0][4 * p + 2], r[1][4 * p + 2], r[0][4 * p + 3], r[1][4 * p + 3]},
                         v.z, v.w);
        }
        if constexpr (Decoder::kScales == 2) {
          const uint32_t one = pair_of<T>(1.0f), ones[4] = {one, one, one, one};
          mma_16x8x16<T>(x_sums, ones, v.x, v.y);
          mma_16x8x16<T>(x_sums, ones, v.z, v.w);
        }
      }
      if constexpr (Decoder::kScales > 0)
#pragma unroll
        for (int i = 0; i < 4 * P::kTiles; ++i) {
          float v = part[i / 4][i % 4];
          if constexpr (Decoder::kScales == 2) v = fmaf(shift[i / 2], x_sums[i % 2], v);
          float& sum = sums[i / 4][n][i % 4];
          sum = fmaf(scale[i / 2], v, sum);
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
  const Ring<P> ring{layer,
                     product,
                     shared + Decoder::kTableBytes,
                     P::stage_bytes(product.m),
                     warp,
                     lane,
                     depth,
                     row_warp,
                     row0};
  const int steps = static_cast<int>(product.steps);
  const int64_t chunk = static_cast<int64_t>(blockIdx.y) * steps * P::kDepths + depth;

  for (int s = 0; s < P::kStages - 1; ++s) {
    if (s < steps) ring.load(chunk + s * P::kDepths, s);
    commit_copies();
  }
  float sums[P::kTiles][P::kColumns][4] = {};
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
      parts[(warp * P::kSums + i) * 32 + lane] =
          sums[i / 4 / P::kColumns][i / 4 % P::kColumns][i % 4];
  __syncthreads();
  if (depth > 0) return;
  float* y = product.y + static_cast<int64_t>(blockIdx.y) * product.m * layer.out;
#pragma unroll
  for (int i = 0; i < P::kSums; ++i) {
    float sum = sums[i / 4 / P::kColumns][i / 4 % P::kColumns][i % 4];
    for (int d = 1; d < P::kDepths; ++d)
      sum += parts[((d * P::kRowWarps + warp) * P::kSums + i) * 32 + lane];
    const int64_t row = row0 + i / 4 / P::kColumns * 16 + i % 4 / 2 * 8 + lane / 4;
    const int column = i / 4 % P::kColumns * 8 + lane % 4 * 2 + i % 2;
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

// Calls visit(Plan{}) with the plan for m rows of x. Two tiles to a warp halve what activations
// cost, where the registers hold them.
template <class Decoder, class Visit>
auto with_plan(int64_t m, Visit&& visit) {
  constexpr int kTwo = Decoder::kRun == 8 ? 2 : 1;
  if constexpr (Decoder::kTableBytes <= 8192)
    if (m <= 2) return visit(Plan<Decoder, 1, 1, 1>{});
  if (m <= 8) return visit(Plan<Decoder, 1, 1, 4>{});
  if (m <= 16) return visit(Plan<Decoder, kTwo, 2, 4>{});
  if (m <= 32) return visit(Plan<Decoder, kTwo, 4, 4>{});
  return visit(Plan<Decoder, kTwo, 8, 4>{});
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
  return with_plan<Decoder>(m, [&](auto plan) {
    const int64_t count = splits_of<decltype(plan)>(layer).count;
    return count > 1 ? count * m * layer.out * static_cast<int64_t>(sizeof(float)) : int64_t{0};
  });
}

template <class Decoder, class T>
cudaError_t row_product(const LayerView& layer, const void* x, int64_t m, float* y, void* scratch,
                        cudaStream_t stream) {
  return with_plan<Decoder>(m, [&](auto plan) {
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
    const cudaError_t error = run(row_product_kernel<P, T>, grid, kProductThreads,
                                  static_cast<size_t>(P::shared_bytes(m)), stream, layer, product);
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
