// y = x @ T^T for up to 64 rows of x.
#include "trellis_product.cuh"

namespace rs::cuda {
namespace {

// A step is 2 x 4 tiles: the decoded T (32, 64) is two operands of 16 rows by four of 16 columns.
// Rows of an operand are rows of tiles in the order in which lanes hold them, and its columns four
// of each of the four tiles; x has its columns in that order. N: batch rows in eights.
template <int K, int N, class T_>
struct Forward : Wide {
  using T = T_;
  static constexpr int kBits = K, kBatch = 8 * N, kRounds = N;
  static constexpr int kWarps = N == 8 ? 8 : N == 4 ? 12 : 16;  // whose registers hold the sums

  RS_HD static int64_t from(const LayerView& layer) { return layer.in; }
  RS_HD static int64_t to(const LayerView& layer) { return layer.out; }
  static int64_t groups(const LayerView& layer) { return (layer.tile_rows() + 1) / 2; }
  static int64_t steps(const LayerView& layer) { return (layer.tile_cols() + 3) / 4; }

  // The lane's tile of a group at step 0, and how many tiles on it is at a later step.
  __device__ __forceinline__ static int64_t tile(const LayerView& layer, int group, int lane) {
    const int64_t rows = layer.out / 16, r = 2 * static_cast<int64_t>(group) + row(lane);
    return min(r, rows - 1) * (layer.in / 16);
  }
  __device__ __forceinline__ static int64_t tiles(const LayerView& layer, int step, int lane) {
    return min(4 * step + col(lane), static_cast<int>(layer.in / 16) - 1);
  }

  __device__ __forceinline__ static void add(const LayerView& layer, const uint32_t (&words)[K + 1],
                                             const unsigned char* table, const T* x, int batch,
                                             int step, int lane, float (&sum)[N][2][4]) {
    const int g = lane / 4;
    const int c = 4 * step + col(lane);
    const bool inside = c < static_cast<int>(layer.in / 16);
    const T* at = x + g * layer.in + 16 * static_cast<int64_t>(c);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[2][2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int n = i / 4 * 16 + i % 2 * 8 + 4 * half + 2 * j + i % 4 / 2;
          a[j][i / 4][i % 4] = quarter_pair<K>(words, n, table, 4 * lane);
        }
#pragma unroll
      for (int n = 0; n < N; ++n) {
        uint4 b = make_uint4(0, 0, 0, 0);
        if (inside && 8 * n + g < batch)
          b = __ldg(reinterpret_cast<const uint4*>(at + 8 * n * layer.in) + half);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma_16x8x16<T>(sum[n][i], a[0][i], b.x, b.y);
          mma_16x8x16<T>(sum[n][i], a[1][i], b.z, b.w);
        }
      }
    }
  }

  // Where sum i of a lane's round goes: its row of x, its column of y.
  __device__ __forceinline__ static int64_t output(int group, int round, int i, int lane,
                                                   int* batch) {
    *batch = 8 * round + lane % 4 * 2 + i % 2;
    return 32 * static_cast<int64_t>(group) + 16 * row(lane) + 4 * quarter(lane) + i / 2;
  }
};

template <int K>
cudaError_t linear(const LayerView& layer, const void* x, Type type, int64_t m, float* y,
                   void* scratch, cudaStream_t stream) {
  return with_side<Forward, K, 1, 2, 4, 8>(
      type, m, [&](auto side) { return product<decltype(side)>(layer, x, m, y, scratch, stream); });
}

template <int K>
int64_t scratch(const LayerView& layer, int64_t m) {
  return with_side<Forward, K, 1, 2, 4, 8>(
      Type::bfloat16, m, [&](auto side) { return product_scratch<decltype(side)>(layer, m); });
}

// A thread owns one output.
__global__ void __launch_bounds__(256) add_parts_kernel(const float* __restrict__ parts, int splits,
                                                        int64_t count, float* __restrict__ y) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= count) return;
  float sum = 0;
  for (int s = 0; s < splits; ++s) sum += parts[s * count + i];
  y[i] = sum;
}

}  // namespace

cudaError_t add_parts(const float* parts, int splits, int64_t count, float* y,
                      cudaStream_t stream) {
  return run(add_parts_kernel, static_cast<unsigned>((count + 255) / 256), 256, 0, stream, parts,
             splits, count, y);
}

void trellis_linear_slots(CudaRow& row, int k) {
  with_trellis_bits(k, [&]<int K> {
    row.linear = linear<K>;
    row.linear_scratch = scratch<K>;
    row.linear_max_m = 64;
  });
}

}  // namespace rs::cuda
