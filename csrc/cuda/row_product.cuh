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

#include "loops.cuh"
#include "pairs.cuh"

namespace rs::cuda {

constexpr int kProductThreads = 256, kProductWarps = kProductThreads / 32;
constexpr int64_t kProductMaxRows = 64;  // of x

// An odd multiple of `unit`, so that eight rows start in different banks.
constexpr int odd_pitch(int bytes, int unit) { return ((bytes + unit - 1) / unit | 1) * unit; }

// A warp owns 16 Tiles rows of T and 8 Columns rows of x; RowWarps warps of a block stand side by
// side and share x, the others split the columns of T.
template <class Codec, int Tiles, int Columns, int RowWarps, int Hold = 1>
struct Plan {
  using Decoder = Codec;
  static constexpr int kTiles = Tiles, kColumns = Columns, kRowWarps = RowWarps;
  static constexpr int kDepths = kProductWarps / RowWarps;
  static constexpr int kRows = 16 * Tiles, kBlockRows = kRows * RowWarps;
  // Columns of T that four lanes decode at once; those that a warp takes at a time.
  static constexpr int kStrip = 4 * Codec::kRun, kWide = Columns == 1 ? 256 : 128;
  static constexpr int kStrips = kStrip < kWide ? kWide / kStrip : 1;
  static constexpr int kChunk = kStrip * kStrips;
  static constexpr int kChunkBytes = kChunk / Codec::kRun * Codec::kRunBytes;
  static constexpr int kPieces = kChunkBytes / 16;
  static constexpr int kPitch = odd_pitch(kChunkBytes, 4 * Codec::kRead);
  static constexpr int kXPitch = odd_pitch(2 * kChunk, 64);
  // Strips that are known to have one scale, and such scales of a row of a chunk.
  static constexpr int kHold = Hold, kSlots = kStrips / Hold;
  static constexpr int kScaleFloats = Codec::kScales * kRows * kSlots;  // of a warp
  static constexpr int kSums = Tiles * Columns * 4;
  static constexpr bool kShifted =
      Codec::kScales == 2 || (Codec::kScales == 1 && Codec::kShift != 0);

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
  int codes_width, x_width;  // bytes of one copy, 1 to 16
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

// One copy to shared memory, or zeros past the end of a row. Bytes go through registers.
template <int Width>
__device__ __forceinline__ void copy_or_clear(unsigned char* to, const unsigned char* from,
                                              bool inside) {
  using Unit = std::conditional_t<
      Width == 16, uint4,
      std::conditional_t<Width == 8, uint2,
                         std::conditional_t<Width == 4, uint32_t, unsigned char>>>;
  if (!inside)
    *reinterpret_cast<Unit*>(to) = Unit{};
  else if constexpr (Width > 1)
    copy_async<Width>(to, from);
  else
    *to = *from;
}

// Rows [0, rows) of `bytes` bytes, `stride` apart, from column `at` on to rows `Pitch` apart in
// shared memory, which takes Bytes of each: by `team` threads, of which this is number `i`.
template <int Width, int Bytes, int Pitch>
__device__ __forceinline__ void copy_rows(unsigned char* to, const unsigned char* from, int rows,
                                          int64_t bytes, int64_t at, int i, int team) {
  constexpr int kUnits = Bytes / Width;
#pragma unroll 1
  for (; i < rows * kUnits; i += team) {
    const int row = i / kUnits, unit = i % kUnits * Width;
    copy_or_clear<Width>(to + row * Pitch + unit, from + row * bytes + at + unit,
                         at + unit < bytes);
  }
}
template <int Bytes, int Pitch>
__device__ __forceinline__ void copy_rows(unsigned char* to, const unsigned char* from, int rows,
                                          int64_t bytes, int64_t at, int i, int team, int width) {
  if (width == 16)
    copy_rows<16, Bytes, Pitch>(to, from, rows, bytes, at, i, team);
  else if (width == 8)
    copy_rows<8, Bytes, Pitch>(to, from, rows, bytes, at, i, team);
  else if (width == 4)
    copy_rows<4, Bytes, Pitch>(to, from, rows, bytes, at, i, team);
  else
    copy_rows<1, Bytes, Pitch>(to, from, rows, bytes, at, i, team);
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
  int64_t code_offset, scale_offset;  // of this lane's first copies of a chunk

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
    const bool inside = (chunk + 1) * P::kChunk <= layer.in && row0 + P::kRows <= layer.out;
    if (inside && product.codes_width == 16 && product.x_width == 16)
      load_whole(chunk, stage);
    else
      load_part(chunk, stage);
  }

  __device__ __forceinline__ void load_whole(int64_t chunk, int stage) const {
    constexpr int kXPieces = P::kChunk / 8, kStep = 32 / P::kPieces;
    const unsigned char* from = layer.codes + code_offset + chunk * P::kChunkBytes;
    unsigned char* to = codes(stage) + lane / P::kPieces * P::kPitch + lane % P::kPieces * 16;
#pragma unroll
    for (int row = 0; row < P::kRows; row += kStep) {
      const bool mine = lane / P::kPieces < min(kStep, P::kRows - row);
      if (32 % P::kPieces == 0 || mine) copy_async<16>(to + row * P::kPitch, from);
      from += kStep * product.row_bytes;
    }
    if constexpr (Decoder::kScales > 0) load_scales<true>(chunk, P::kRows, scales(stage));
    from = static_cast<const unsigned char*>(product.x) + chunk * P::kChunk * 2;
    to = x(stage);
#pragma unroll 1
    for (int i = row_warp * 32 + lane; i < product.m * kXPieces; i += 32 * P::kRowWarps) {
      const int row = i / kXPieces, piece = i % kXPieces * 16;
      copy_async<16>(to + row * P::kXPitch + piece, from + row * layer.in * 2 + piece);
    }
  }

  __device__ __forceinline__ void load_part(int64_t chunk, int stage) const {
    const int rows = static_cast<int>(min(layer.out - row0, int64_t{P::kRows}));
    copy_rows<P::kChunkBytes, P::kPitch>(codes(stage), layer.codes + row0 * product.row_bytes, rows,
                                         product.row_bytes, chunk * P::kChunkBytes, lane, 32,
                                         product.codes_width);
    if constexpr (Decoder::kScales > 0) load_scales<false>(chunk, rows, scales(stage));
    copy_rows<2 * P::kChunk, P::kXPitch>(x(stage), static_cast<const unsigned char*>(product.x),
                                         product.m, layer.in * 2, chunk * P::kChunk * 2,
                                         row_warp * 32 + lane, 32 * P::kRowWarps, product.x_width);
  }

  // A lane copies those of one slot, of every so many rows.
  template <bool Whole>
  __device__ __forceinline__ void load_scales(int64_t chunk, int rows, float* to) const {
    static_assert(Decoder::kScales == 0 || 32 % P::kSlots == 0);
    constexpr int kStep = 32 / P::kSlots;
    const int64_t column = chunk * P::kChunk + lane % P::kSlots * P::kHold * P::kStrip;
    int64_t at =
        scale_offset + (product.group_shift >= 0 ? column >> product.group_shift
                                                 : static_cast<uint32_t>(column) / product.group);
#pragma unroll
    for (int row = 0; row < P::kRows; row += kStep) {
#pragma unroll
      for (int i = 0; i < Decoder::kScales; ++i) {
        float* scale = to + (i * P::kRows + row) * P::kSlots + lane;
        if (!Whole && column >= layer.in)
          *scale = 0;
        else if (Whole || row + lane / P::kSlots < rows)
          copy_async<4>(scale, layer.params[i] + at);
      }
      at += kStep * product.groups;
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
