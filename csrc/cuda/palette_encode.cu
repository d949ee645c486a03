#include "../codecs/palette.h"
#include "../codecs/palette_nearest.h"
#include "encode_slots.h"
#include "loops.cuh"

namespace rs::cuda {
namespace {

// A thread owns one tile at a time; a block sorts the codebook once.
template <class Index>
__global__ void __launch_bounds__(kLoopThreads)
    nearest_kernel(LayerView layer, const float* __restrict__ weights,
                   uint8_t* __restrict__ codes) {
  __shared__ float middle[Index::kEntries];
  __shared__ uint8_t code[Index::kEntries];
  if (threadIdx.x == 0) {
    const SortedEntries sorted(layer.params[0], Index::kEntries);
    for (int e = 0; e < Index::kEntries; ++e) {
      middle[e] = sorted.middle[e];
      code[e] = sorted.code[e];
    }
  }
  __syncthreads();
  const int64_t cols = layer.tile.cols, tiles = layer.out * layer.tile_cols();
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kLoopThreads + threadIdx.x; tile < tiles;
       tile += static_cast<int64_t>(gridDim.x) * kLoopThreads)
    for (int64_t j = 0; j < cols; ++j) {
      const float w = weights[tile * cols + j];
      int rank = 0;
      for (int m = 0; m + 1 < Index::kEntries; ++m) rank += w > middle[m];
      Index::write(codes + tile * layer.tile.bytes, j, code[rank]);
    }
}

// A thread owns one tile at a time; the codebook is in shared memory.
__global__ void __launch_bounds__(kLoopThreads)
    nearest_pair_kernel(LayerView layer, const float* __restrict__ weights,
                        const float* __restrict__ importance, uint8_t* __restrict__ codes) {
  __shared__ float book[2 * PairIndex::kEntries];
  if (threadIdx.x < 2 * PairIndex::kEntries) book[threadIdx.x] = layer.params[0][threadIdx.x];
  __syncthreads();
  const int64_t cols = layer.tile.cols, tiles = layer.out * layer.tile_cols();
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kLoopThreads + threadIdx.x; tile < tiles;
       tile += static_cast<int64_t>(gridDim.x) * kLoopThreads) {
    const float* w = weights + tile * cols;
    const float* h = importance ? importance + tile % layer.tile_cols() * cols : nullptr;
    for (int64_t j = 0; j < cols; j += 2) {
      const float ha = h ? h[j] : 1.0f, hb = h ? h[j + 1] : 1.0f;
      float least = INFINITY;
      uint32_t code = 0;
      for (uint32_t e = 0; e < PairIndex::kEntries; ++e) {
        const float cost = pair_cost(w[j], w[j + 1], ha, hb, book[2 * e], book[2 * e + 1]);
        code = cost < least ? e : code;
        least = cost < least ? cost : least;
      }
      PairIndex::write(codes + tile * layer.tile.bytes, j / 2, code);
    }
  }
}

template <class Index>
cudaError_t encode(const LayerView& layer, const float* w, const float* importance, uint8_t* codes,
                   float* const*, void*, cudaStream_t stream) {
  const unsigned blocks = blocks_for(layer.out * layer.tile_cols(), kLoopThreads);
  if constexpr (Index::kUnit == 2)
    return run(nearest_pair_kernel, blocks, kLoopThreads, 0, stream, layer, w, importance, codes);
  else
    return run(nearest_kernel<Index>, blocks, kLoopThreads, 0, stream, layer, w, codes);
}

}  // namespace

void palette_encode_slots(CudaRow& row, const Term& term) {
  if (term.spec.number("group", 0) != 0) return;  // codebooks are fitted, on the host
  const std::string layout = term.spec.word("layout", "dense");
  constexpr decltype(CudaRow::encode) kDense[] = {encode<DenseIndex<1>>, encode<DenseIndex<2>>,
                                                  encode<DenseIndex<3>>, encode<DenseIndex<4>>};
  row.encode = layout == "words"  ? encode<WordIndex>
               : layout == "pair" ? encode<PairIndex>
                                  : kDense[static_cast<int>(term.spec.number("bits", 3)) - 1];
}

}  // namespace rs::cuda
