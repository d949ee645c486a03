#include "../codecs/hybrid.h"

#include "codecs.h"
#include "loops.cuh"

namespace rs::cuda {
namespace {

// LayerView::tables of a block size: D by its angle, its constant row, b [k][i][j].
template <int Side>
struct WaveTables {
  static constexpr int kTurns = 4 * Side;
  float wave[kTurns], constant, smooth[kSmooth][Side * Side];
};

// A thread owns an angle, and the smooth functions of a weight.
template <int Side>
__global__ void __launch_bounds__(kLoopThreads) table_kernel(WaveTables<Side>* tables) {
  const int n = static_cast<int>(blockIdx.x * kLoopThreads + threadIdx.x);
  if (n < WaveTables<Side>::kTurns) tables->wave[n] = hybrid_wave(n, 2, Side);
  if (n == 0) tables->constant = hybrid_wave(0, 1, Side);
  if (n >= Side * Side) return;
  float b[kSmooth];
  hybrid_functions(n / Side, n % Side, Side, b);
  for (int k = 0; k < kSmooth; ++k) tables->smooth[k][n] = b[k];
}

constexpr int kEntries = 256;  // of a tile that stand in shared memory at a time

// A block owns a strip of up to 32 columns of one tile at a time: the strip's entries are spread
// over its frequencies, then transformed down the columns, all in shared memory. A thread owns a
// column's frequencies, and later its rows, that are the same modulo the number of parts.
template <int Side, class T>
__global__ void __launch_bounds__(kLoopThreads)
    strip_kernel(LayerView layer, TileRange range, T* __restrict__ w, int64_t stride) {
  constexpr int kLanes = Side < 32 ? Side : 32, kParts = kLoopThreads / kLanes,
                kStrips = Side / kLanes, kMask = WaveTables<Side>::kTurns - 1, kRows = 4;
  __shared__ float coefficient[kSmooth], value[kEntries];
  __shared__ uint16_t position[kEntries];
  const auto& tables = *static_cast<const WaveTables<Side>*>(layer.tables);
  float* wave = dynamic_shared<float>();
  const int thread = threadIdx.x, lane = thread % kLanes, part = thread / kLanes;
  float* g = wave + WaveTables<Side>::kTurns + lane;  // [frequency][lane]
  float* t = g + Side * kLanes;                       // [row][lane]
  for (int k = thread; k < WaveTables<Side>::kTurns; k += kLoopThreads) wave[k] = tables.wave[k];
  const float constant = tables.constant;
  const int64_t width = range.col1 - range.col0, terms = (layer.tile.bytes - 2 * kSmooth) / 4;
  for (int64_t n = blockIdx.x; n < (range.row1 - range.row0) * width * kStrips; n += gridDim.x) {
    const int64_t tile = n / kStrips, row = tile / width, col = tile % width;
    const int j = static_cast<int>(n % kStrips) * kLanes + lane;
    const uint8_t* bytes =
        layer.codes +
        ((range.row0 + row) * layer.tile_cols() + range.col0 + col) * layer.tile.bytes;
    const auto word = [&](int64_t at) {
      return static_cast<uint32_t>(bytes[2 * at] | bytes[2 * at + 1] << 8);
    };
    for (int u = part; u < Side; u += kParts) g[u * kLanes] = 0.0f;
    __syncthreads();  // the last strip is done with the coefficients
    if (thread < kSmooth) coefficient[thread] = half_value(word(thread));
    for (int64_t e0 = 0; e0 < terms; e0 += kEntries) {
      const int count = static_cast<int>(min(int64_t{kEntries}, terms - e0));
      __syncthreads();
      if (thread < count) {
        position[thread] = static_cast<uint16_t>(word(kSmooth + e0 + thread) & (Side * Side - 1));
        value[thread] = half_value(word(kSmooth + terms + e0 + thread));
      }
      __syncthreads();
      for (int e = 0; e < count; ++e) {
        const int u = position[e] / Side, v = position[e] % Side;
        if (u % kParts != part) continue;
        const float d = v ? wave[(2 * j + 1) * v & kMask] : constant;
        g[u * kLanes] = add(g[u * kLanes], mul(value[e], d));
      }
    }
    if (part == 0) t[0] = mul(constant, g[0]);
    __syncthreads();
    for (int size = 2; size <= Side; size *= 2) {
      const int step = Side / size, half = size / 2;
      for (int first = part; first < half; first += kRows * kParts) {
        float odd[kRows] = {};
        for (int u = step; u < Side; u += 2 * step) {
          const float amplitude = g[u * kLanes];
#pragma unroll
          for (int q = 0; q < kRows; ++q)
            odd[q] = add(odd[q], mul(wave[(2 * (first + q * kParts) + 1) * u & kMask], amplitude));
        }
#pragma unroll
        for (int q = 0; q < kRows; ++q) {
          const int i = first + q * kParts;
          if (i >= half) break;
          const float even = t[i * kLanes];
          t[i * kLanes] = add(even, odd[q]);
          t[(size - 1 - i) * kLanes] = add(even, -odd[q]);
        }
      }
      __syncthreads();
    }
    for (int i = part; i < Side; i += kParts) {
      float sum = 0.0f;
#pragma unroll
      for (int k = 0; k < kSmooth; ++k)
        sum = add(sum, mul(coefficient[k], tables.smooth[k][i * Side + j]));
      w[(row * Side + i) * stride + col * Side + j] = narrow<T>(add(sum, t[i * kLanes]));
    }
  }
}

template <int Side>
cudaError_t prepare(const LayerView& layer, cudaStream_t stream) {
  const int64_t threads = std::max(Side * Side, WaveTables<Side>::kTurns);
  return run(table_kernel<Side>, blocks_for(threads, kLoopThreads), kLoopThreads, 0, stream,
             static_cast<WaveTables<Side>*>(layer.tables));
}

template <int Side>
cudaError_t decode(const LayerView& layer, TileRange range, void* w, int64_t stride, Type type,
                   cudaStream_t stream) {
  constexpr int kLanes = Side < 32 ? Side : 32;
  constexpr size_t kShared = (WaveTables<Side>::kTurns + 2 * Side * kLanes) * sizeof(float);
  const int64_t strips = (range.row1 - range.row0) * (range.col1 - range.col0) * (Side / kLanes);
  return with_type(type, [&](auto t) {
    using T = decltype(t);
    return run(strip_kernel<Side, T>, blocks_for(strips, 1), kLoopThreads, kShared, stream, layer,
               range, static_cast<T*>(w), stride);
  });
}

template <int Side>
CudaRow row_of(int64_t side) {
  if (side == Side) {
    CudaRow row;
    row.table_bytes = sizeof(WaveTables<Side>);
    row.prepare = prepare<Side>;
    row.decode = decode<Side>;
    return row;
  }
  if constexpr (Side < 256) return row_of<2 * Side>(side);
  return {};
}

}  // namespace

// Nothing but the frame is trained.
CudaRow hybrid_row(const Term& term) { return row_of<8>(term.row.tile.rows); }

}  // namespace rs::cuda
