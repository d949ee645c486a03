// T as rows of float32, bfloat16 or float16.
#include <algorithm>

#include "trellis.cuh"
#include "trellis_slots.h"

namespace rs::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// A point and its signed copies in T's own type: one register, or two of float32.
template <class T>
struct Point {
  uint32_t pair;

  __device__ explicit Point(float2 uv) : pair(pack<T>(uv)) {}
  __device__ __forceinline__ void store(uint32_t p, uint32_t* to) const {
    *to = pair ^ (p & kSigns);
  }
};
template <>
struct Point<float> {
  uint32_t u, v;

  __device__ explicit Point(float2 uv)
      : u(std::bit_cast<uint32_t>(uv.x)), v(std::bit_cast<uint32_t>(uv.y)) {}
  __device__ __forceinline__ void store(uint32_t p, uint32_t* to) const {
    to[0] = u ^ (p << 16 & 0x80000000u);
    to[1] = v ^ (p & 0x80000000u);
  }
};

// A block owns every gridDim-th eight steps of 2 x 4 tiles, a warp a step, a lane four rows of a
// tile; codes are read and weights written once, 16 bytes at a time. One copy of the table: where
// the weights go takes longer than the lanes that wait for a bank.
template <int K, class T>
__global__ void __launch_bounds__(kThreads)
    decode_quarters_kernel(LayerView layer, TileRange range, T* __restrict__ w, int64_t stride) {
  alignas(16) __shared__ unsigned char raw[kPoints * sizeof(Point<T>)];
  __shared__ Directions directions;
  auto* table = reinterpret_cast<Point<T>*>(raw);
  directions.turn(layer);
  __syncthreads();
  for (int e = threadIdx.x; e < kPoints; e += kThreads)
    table[e] = Point<T>(directions.point(layer, e));
  __syncthreads();

  const int lane = threadIdx.x % 32;
  const int64_t across = (range.col1 - range.col0 + 3) / 4;
  const int64_t steps = (range.row1 - range.row0 + 1) / 2 * across;
  for (int64_t step = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; step < steps;
       step += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t row = range.row0 + step / across * 2 + Wide::row(lane);
    const int64_t col = range.col0 + step % across * 4 + Wide::col(lane);
    const int64_t tile = min(row, range.row1 - 1) * (layer.in / 16) + min(col, range.col1 - 1);
    uint32_t words[K + 1];
    load_quarter<K>(layer.codes + tile * (16 * K) + Wide::quarter(lane) * (4 * K), words);
    words[K] = __shfl_sync(0xFFFFFFFFu, words[0], Wide::beyond(lane));
    if (row >= range.row1 || col >= range.col1) continue;
    T* at =
        w + ((row - range.row0) * 16 + 4 * Wide::quarter(lane)) * stride + (col - range.col0) * 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t out[4 * sizeof(T)];
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const uint32_t p = quarter_hash<K>(words, 8 * i + n);
        table[p >> 5 & (kPoints - 1)].store(p, out + n * sizeof(T) / 2);
      }
#pragma unroll
      for (int n = 0; n < 4 * static_cast<int>(sizeof(T)); n += 4)
        reinterpret_cast<uint4*>(at + i * stride)[n / 4] =
            make_uint4(out[n], out[n + 1], out[n + 2], out[n + 3]);
    }
  }
}

template <int K>
cudaError_t decode(const LayerView& layer, TileRange range, void* w, int64_t stride, Type type,
                   cudaStream_t stream) {
  const int64_t steps = (range.row1 - range.row0 + 1) / 2 * ((range.col1 - range.col0 + 3) / 4);
  const auto blocks = static_cast<unsigned>(
      std::clamp<int64_t>((steps + kWarps - 1) / kWarps, 1, 8 * processors()));
  return with_type(type, [&](auto t) {
    using T = decltype(t);
    return run(decode_quarters_kernel<K, T>, blocks, kThreads, 0, stream, layer, range,
               static_cast<T*>(w), stride);
  });
}

}  // namespace

void trellis_decode_slots(CudaRow& row, int k) {
  with_trellis_bits(k, [&]<int K> { row.decode = decode<K>; });
}

}  // namespace rs::cuda
