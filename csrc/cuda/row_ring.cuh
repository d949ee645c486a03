// What a block of the products in row_product.cuh holds in shared memory, and how it gets there.
#pragma once

#include <algorithm>
#include <type_traits>

#include "ptx.cuh"
#include "row.h"

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
  static constexpr int kMost = kProductShared;
  static constexpr int kRoom = std::min(226 * 1024 / kBlocks - 1024, kMost) - Codec::kTableBytes;
  static constexpr int kMaxRows = RowWarps == 1 ? 2 : 8 * Columns;  // of x
  static constexpr int kStages = std::clamp(kRoom / stage_bytes(kMaxRows), 2, 4);
  static constexpr int kSumBytes = kProductThreads * kSums * 4;
  static constexpr int shared_bytes(int64_t m) {
    return Codec::kTableBytes + std::max(kStages * stage_bytes(m), kSumBytes);
  }
  static_assert(shared_bytes(kMaxRows) <= kMost);
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

}  // namespace rs::cuda
