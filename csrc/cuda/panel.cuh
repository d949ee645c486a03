// decode for codecs whose rows are runs of codes one after the other: eight neighbours at a time,
// by the same member of the same struct as decode_loop, so with the same bits.
#pragma once

#include "loops.cuh"

namespace rs::cuda {

template <int Bytes>
struct RunBytes {
  uint8_t at[Bytes];
};

// A thread owns eight neighbours of a row at a time: their codes are one read, and they one or two
// writes.
template <class Codec, int Bytes, class T>
__global__ void __launch_bounds__(kLoopThreads)
    panel_kernel(LayerView layer, TileRange range, T* __restrict__ w, int64_t stride) {
  using Read = std::conditional_t<Bytes == 8, uint2,
                                  std::conditional_t<Bytes == 4, uint32_t, RunBytes<Bytes>>>;
  const int64_t cols = layer.tile.cols, runs = (range.col1 - range.col0) * cols / 8;
  decltype(auto) tables = tables_of<Codec>(layer);
  const int64_t count = (range.row1 - range.row0) * runs;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kLoopThreads + threadIdx.x; n < count;
       n += static_cast<int64_t>(gridDim.x) * kLoopThreads) {
    const int64_t i = n / runs, j = n % runs, row = range.row0 + i;
    const int64_t column = range.col0 * cols + 8 * j;
    const auto codes = std::bit_cast<RunBytes<Bytes>>(
        *reinterpret_cast<const Read*>(layer.codes + (row * layer.in + column) / 8 * Bytes));
    struct alignas(16) Values {
      T at[8];
    } values;
#pragma unroll
    for (int k = 0; k < 8; k += Codec::kUnit) {
      float value[Codec::kUnit];
      Codec::decode(codes.at, row, column / cols, k / Codec::kUnit, tables, value);
#pragma unroll
      for (int u = 0; u < Codec::kUnit; ++u) values.at[k + u] = narrow<T>(value[u]);
    }
    *reinterpret_cast<Values*>(w + i * stride + 8 * j) = values;
  }
}

// Bytes of eight codes. Where runs are no whole tiles' or stand at odd addresses: the loop.
template <class Codec, int Bytes>
cudaError_t decode_panel(const LayerView& layer, TileRange range, void* w, int64_t stride,
                         Type type, cudaStream_t stream) {
  const int64_t cols = layer.tile.cols, width = (range.col1 - range.col0) * cols;
  const auto addresses = reinterpret_cast<uintptr_t>(w) |
                         reinterpret_cast<uintptr_t>(layer.codes) * (Bytes % 4 ? 0 : 16 / Bytes);
  if (layer.in % 8 || width % 8 || range.col0 * cols % 8 || stride % 8 || addresses % 16 ||
      layer.tile.bytes * 8 != cols * Bytes)
    return decode_loop<Codec>(layer, range, w, stride, type, stream);
  return with_type(type, [&](auto t) {
    using T = decltype(t);
    return run(panel_kernel<Codec, Bytes, T>,
               blocks_for((range.row1 - range.row0) * width / 8, kLoopThreads), kLoopThreads, 0,
               stream, layer, range, static_cast<T*>(w), stride);
  });
}

}  // namespace rs::cuda
