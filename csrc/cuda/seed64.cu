#include "../codecs/seed64.h"

#include "codecs.h"
#include "loops.cuh"

namespace rs::cuda {
namespace {

constexpr int kCell = 4;  // side of what a thread owns: the smallest block
constexpr int kTreeCells = kTreeSide / kCell;

// The pattern m in the block's shared memory: a thread makes an entry.
struct Pattern {
  float at[256];
  __device__ void fill() {
    at[threadIdx.x] =
        static_cast<float>(add(1.0, mul(0.1, turn_sine(static_cast<uint64_t>(threadIdx.x), 256))));
  }
  // Of row i, column j of a block.
  __device__ float of(int64_t i, int64_t j) const { return at[(31 * i + 17 * j) & 255]; }
};
static_assert(kLoopThreads == 256);

__device__ __forceinline__ float factor_of(const uint8_t* word) {
  const uint64_t seed = seed_word(word);
  return static_cast<float>(
      seed_value(static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(seed)));
}

// A tree's split bits with the leaves below each node, in the block's shared memory.
struct Tree {
  uint16_t leaves[kTreeNodes];

  __device__ static bool splits(const uint8_t* tree, int node) {
    return tree[node >> 3] >> (node & 7) & 1;
  }
  __device__ static int first_of(int level) { return ((1 << 2 * level) - 1) / 3; }

  // By levels, the lowest first; below the last all are leaves. A thread owns a node.
  __device__ void count(const uint8_t* tree) {
    for (int level = kTreeLevels - 1; level >= 0; --level) {
      const int side = 1 << level, first = first_of(level), below = first_of(level + 1);
      for (int n = threadIdx.x; n < side * side; n += kLoopThreads) {
        const int child = below + 2 * (n / side) * 2 * side + 2 * (n % side);
        int sum = 1;
        if (splits(tree, first + n))
          sum = level == kTreeLevels - 1
                    ? 4
                    : leaves[child] + leaves[child + 1] + leaves[child + 2 * side] +
                          leaves[child + 2 * side + 1];
        leaves[first + n] = static_cast<uint16_t>(sum);
      }
      __syncthreads();
    }
  }
  // The number of the leaf that holds a cell.
  __device__ int leaf(const uint8_t* tree, int y, int x, int* size) const {
    int n = 0, level = 0;
    for (; level < kTreeLevels; ++level) {
      const int up = kTreeLevels - level;
      if (!splits(tree, first_of(level) + ((y >> up) << level) + (x >> up))) break;
      const int child_y = y >> (up - 1), child_x = x >> (up - 1);
      const int earlier = 2 * (child_y & 1) + (child_x & 1);
      for (int c = 0; c < earlier; ++c)
        n += level == kTreeLevels - 1
                 ? 1
                 : leaves[first_of(level + 1) + (((child_y & ~1) + c / 2) << (level + 1)) +
                          (child_x & ~1) + c % 2];
    }
    *size = static_cast<int>(kTreeSide) >> level;
    return n;
  }
};

// Visits every cell of the tiles of a range: visit(p, side of its block, row, col), row and col
// relative to the range. A thread owns a cell at a time, neighbours in a row neighbouring ones.
template <class Visit>
__device__ void each_block_cell(const LayerView& layer, TileRange range, Visit&& visit) {
  const int64_t side = layer.tile.rows, in_tile = side / kCell;
  const int64_t width = (range.col1 - range.col0) * in_tile;
  const int64_t count = (range.row1 - range.row0) * in_tile * width;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kLoopThreads + threadIdx.x; n < count;
       n += static_cast<int64_t>(gridDim.x) * kLoopThreads) {
    const int64_t y = n / width, x = n % width;
    const int64_t tile = (range.row0 + y / in_tile) * layer.tile_cols() + range.col0 + x / in_tile;
    visit(factor_of(layer.codes + 8 * tile), side, y * kCell, x * kCell);
  }
}
// The same for trees: a block owns a tile at a time.
template <class Visit>
__device__ void each_tree_cell(const LayerView& layer, TileRange range, Tree& tree, Visit&& visit) {
  const int64_t width = range.col1 - range.col0, seeds = (layer.tile.bytes - kTreeBytes) / 8;
  for (int64_t t = blockIdx.x; t < (range.row1 - range.row0) * width; t += gridDim.x) {
    const int64_t y = t / width, x = t % width;
    const uint8_t* tile =
        layer.codes + ((range.row0 + y) * layer.tile_cols() + range.col0 + x) * layer.tile.bytes;
    __syncthreads();
    tree.count(tile);
    for (int n = threadIdx.x; n < kTreeCells * kTreeCells; n += kLoopThreads) {
      const int cell_y = n / kTreeCells, cell_x = n % kTreeCells;
      int size;
      const int64_t leaf = tree.leaf(tile, cell_y, cell_x, &size);
      visit(factor_of(tile + kTreeBytes + 8 * min(leaf, seeds - 1)), int64_t{size},
            y * kTreeSide + cell_y * kCell, x * kTreeSide + cell_x * kCell);
    }
  }
}

template <bool Trees, class Visit>
__device__ __forceinline__ void each_cell(const LayerView& layer, TileRange range, Visit&& visit) {
  if constexpr (Trees) {
    __shared__ Tree tree;
    each_tree_cell(layer, range, tree, visit);
  } else {
    each_block_cell(layer, range, visit);
  }
}

// A thread owns a cell at a time: its seed is turned once, its weights are written once.
template <bool Trees, class T>
__global__ void __launch_bounds__(kLoopThreads)
    cells_kernel(LayerView layer, TileRange range, T* __restrict__ w, int64_t stride) {
  __shared__ Pattern pattern;
  pattern.fill();
  __syncthreads();
  const float scale = *layer.params[0];
  each_cell<Trees>(layer, range, [&](float p, int64_t size, int64_t row, int64_t col) {
    const float factor = mul(p, scale);
    for (int64_t i = row; i < row + kCell; ++i)
      for (int64_t j = col; j < col + kCell; ++j)
        w[i * stride + j] = narrow<T>(mul(factor, pattern.of(i & (size - 1), j & (size - 1))));
  });
}

template <bool Trees>
unsigned blocks_of(const LayerView& layer, TileRange range) {
  const int64_t tiles = (range.row1 - range.row0) * (range.col1 - range.col0);
  return Trees ? blocks_for(tiles, 1)
               : blocks_for(tiles * layer.tile.rows * layer.tile.cols / (kCell * kCell),
                            kLoopThreads);
}

template <bool Trees>
cudaError_t decode(const LayerView& layer, TileRange range, void* w, int64_t stride, Type type,
                   cudaStream_t stream) {
  return with_type(type, [&](auto t) {
    using T = decltype(t);
    return run(cells_kernel<Trees, T>, blocks_of<Trees>(layer, range), kLoopThreads, 0, stream,
               layer, range, static_cast<T*>(w), stride);
  });
}

// The only shared sum: the gradient of the scale, of one term per cell.
struct ScaleSum {
  static constexpr int kSums = 1, kFolds = 1, kGain = 2 * kCell * kCell;
  struct Tables {
    RS_HD explicit Tables(const LayerView&) {}
  };
  RS_HD static void fold(int, const Tables&, const double* sum, float* const* grads) {
    if (grads[0]) grads[0][0] += static_cast<float>(*sum);
  }
};

// A thread owns a cell at a time, and the sum over its cells.
template <bool Trees>
__global__ void __launch_bounds__(kLoopThreads)
    cells_adjoint_kernel(LayerView layer, TileRange range, const float* __restrict__ dw,
                         const float* __restrict__ largest, int64_t terms, Sum* __restrict__ all) {
  __shared__ Pattern pattern;
  pattern.fill();
  __syncthreads();
  DeviceSums sums{all, {}, sum_scale(*largest, ScaleSum::kGain, terms), 0};
  each_cell<Trees>(layer, range, [&](float p, int64_t size, int64_t row, int64_t col) {
    float sum = 0;
    for (int64_t i = row; i < row + kCell; ++i)
      for (int64_t j = col; j < col + kCell; ++j)
        sum += pattern.of(i & (size - 1), j & (size - 1)) * dw[i * layer.in + j];
    sums.shared(0, p * sum);
  });
  for (int h = 16; h; h /= 2) sums.of_last += __shfl_xor_sync(0xFFFFFFFFu, sums.of_last, h);
  if (threadIdx.x % 32 == 0 && sums.of_last) atomicAdd(all, sums.of_last);
}

template <bool Trees>
cudaError_t adjoint(const LayerView& layer, int64_t row0, int64_t row1, const float* dw,
                    const float* largest, void* sums, float* const*, cudaStream_t stream) {
  const TileRange range{row0, row1, 0, layer.tile_cols()};
  const int64_t cells = (row1 - row0) * layer.tile.rows * layer.in / (int64_t{kCell} * kCell);
  const unsigned blocks =
      std::min(blocks_of<Trees>(layer, range), static_cast<unsigned>(4 * processors()));
  if (const cudaError_t error = run(cells_adjoint_kernel<Trees>, blocks, kLoopThreads, 0, stream,
                                    layer, range, dw, largest, cells, static_cast<Sum*>(sums));
      error != cudaSuccess)
    return error;
  return collect_sums<ScaleSum>(largest, cells, 1, sums, stream);
}

template <bool Trees>
CudaRow row_of() {
  CudaRow row;
  row.decode = decode<Trees>;
  row.sum_bytes = sum_bytes(1);
  row.adjoint = adjoint<Trees>;
  row.finish = finish_loop<ScaleSum>;
  return row;
}

}  // namespace

CudaRow seed64_row(const Term& term) {
  return term.spec.number("block", 8) == 0 ? row_of<true>() : row_of<false>();
}

}  // namespace rs::cuda
