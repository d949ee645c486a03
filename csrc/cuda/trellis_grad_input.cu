// dx = dy @ T for up to 64 rows of dy.
#include "trellis_product.cuh"

namespace rs::cuda {
namespace {

// A step is 1 x 8 tiles, lane 4 g + t with quarter t of tile g: the decoded T^T (128, 16) is eight
// operands, each two columns of every tile by the tiles' 16 rows. A register takes one column of
// two states. N: batch rows in eights.
template <int K, int N, class T_>
struct Backward {
  using T = T_;
  static constexpr int kBits = K, kBatch = 8 * N, kRounds = 4 * N;
  static constexpr int kWarps = N == 1 ? 16 : 8;  // whose registers hold the sums

  RS_HD static int64_t from(const LayerView& layer) { return layer.out; }
  RS_HD static int64_t to(const LayerView& layer) { return layer.in; }
  static int64_t groups(const LayerView& layer) { return (layer.tile_cols() + 7) / 8; }
  static int64_t steps(const LayerView& layer) { return layer.tile_rows(); }

  __device__ static int quarter(int lane) { return lane % 4; }
  __device__ static int beyond(int lane) { return (lane & 28) | ((lane + 1) & 3); }
  __device__ __forceinline__ static int64_t tile(const LayerView& layer, int group, int lane) {
    return min(8 * static_cast<int64_t>(group) + lane / 4, layer.in / 16 - 1);
  }
  __device__ __forceinline__ static int64_t tiles(const LayerView& layer, int step, int) {
    return step * (layer.in / 16);
  }

  __device__ __forceinline__ static void add(const LayerView& layer, const uint32_t (&words)[K + 1],
                                             const unsigned char* table, const T* dy, int batch,
                                             int step, int lane, float (&sum)[4 * N][2][4]) {
    const int g = lane / 4;
    const T* at = dy + g * layer.out + 16 * static_cast<int64_t>(step) + 4 * (lane % 4);
    uint2 b[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      b[n] = make_uint2(0, 0);
      if (8 * n + g < batch) b[n] = __ldg(reinterpret_cast<const uint2*>(at + 8 * n * layer.out));
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      uint32_t pair[4], a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) pair[i] = quarter_pair<K>(words, 8 * i + j, table, 4 * lane);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[i] = permute_bytes(pair[i / 2 * 2], pair[i / 2 * 2 + 1], i % 2 ? 0x7632 : 0x5410);
#pragma unroll
      for (int n = 0; n < N; ++n) mma_16x8x16<T>(sum[4 * n + j / 2][j % 2], a, b[n].x, b[n].y);
    }
  }

  __device__ __forceinline__ static int64_t output(int group, int round, int i, int lane,
                                                   int* batch) {
    *batch = round / 4 * 8 + lane % 4 * 2 + i % 2;
    return 16 * (8 * static_cast<int64_t>(group) + lane / 4) + round % 4 * 4 + i / 2;
  }
};

template <int K>
cudaError_t grad_input(const LayerView& layer, const void* dy, Type type, int64_t m, float* dx,
                       void* scratch, cudaStream_t stream) {
  return with_side<Backward, K, 1, 2, 4>(type, m, [&](auto side) {
    return product<decltype(side)>(layer, dy, m, dx, scratch, stream);
  });
}

template <int K>
int64_t scratch(const LayerView& layer, int64_t m) {
  return with_side<Backward, K, 1, 2, 4>(
      Type::bfloat16, m, [&](auto side) { return product_scratch<decltype(side)>(layer, m); });
}

}  // namespace

void trellis_grad_input_slots(CudaRow& row, int k) {
  with_trellis_bits(k, [&]<int K> {
    row.grad_input = grad_input<K>;
    row.grad_input_scratch = scratch<K>;
    row.grad_input_max_m = 64;
  });
}

}  // namespace rs::cuda
