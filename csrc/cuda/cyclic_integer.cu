#include "cyclic_integer.h"

#include <algorithm>
#include <limits>

#include "../codecs/cyclic.h"
#include "loops.cuh"
#include "ptx.cuh"

namespace rs::cuda {
namespace {

constexpr int kDigits = 3;  // a weight is digit 0 + 256 digit 1 + 65536 digit 2, each an int8
constexpr int kStep = 64;   // of the summed index in shared memory
constexpr int kPitch = kStep + 16;  // bytes: the rows of a fragment fall into different banks
constexpr int kThreads = 256;
constexpr int kUsualBlock = 8;
// Of the summed index up to which a 32-bit sum of products of a digit and an int8 cannot overflow.
constexpr int64_t kLongestSum = int64_t{1} << 17;
static_assert(kLongestSum * 128 * kQuantumTop <= std::numeric_limits<int32_t>::max());

// What the product's kernels read and write.
struct Integers {
  LayerView layer;
  int64_t m, outputs, length,
      stride;             // y (m, outputs); sums over `length`; rows of x `stride` apart
  int64_t splits, split;  // of the sum, each `split` long
  int8_t *x, *basis;
  float *units, *basis_unit;
  Sum* sums;  // (m, outputs), of all splits; null when there is one
  float* y;
};

__device__ __forceinline__ float scaled(int64_t sum, const Integers& p, int64_t b, int shift) {
  const double unit = static_cast<double>(p.units[b]) * static_cast<double>(*p.basis_unit) /
                      static_cast<double>(1 << shift);
  return static_cast<float>(static_cast<double>(sum) * unit);
}

// Four weights of row r from column c on, in units of basis_unit / 2^kShift; zeros outside the
// layer. Block: of the layer, or 4 for its other multiples, of whose one code they are, or 1.
template <class Word, int Block>
__device__ __forceinline__ void four_weights(const Integers& p, int64_t r, int64_t c,
                                             int32_t (&w)[4]) {
  const int64_t block = Block == kUsualBlock ? kUsualBlock : p.layer.tile.cols;
  const uint8_t* row = p.layer.codes + r * p.layer.tile_cols() * Word::kBytes;
#pragma unroll
  for (int k = 0; k < 4; ++k) w[k] = 0;
  if (r >= p.layer.out || c >= p.layer.in) return;
  if constexpr (Block > 1) {
    const uint32_t word = cyclic_word<Word>(row + c / block * Word::kBytes);
    const int32_t level = cyclic_level<Word>(word);
    const auto vector =
        *reinterpret_cast<const uint32_t*>(p.basis + Word::index(word) * block + c % block);
#pragma unroll
    for (int k = 0; k < 4; ++k) w[k] = level * static_cast<int8_t>(vector >> (8 * k));
  } else {
    for (int k = 0; k < 4 && c + k < p.layer.in; ++k) {
      const uint32_t word = cyclic_word<Word>(row + (c + k) / block * Word::kBytes);
      w[k] = cyclic_level<Word>(word) * p.basis[Word::index(word) * block + (c + k) % block];
    }
  }
}

// The digits of four weights, each digit's in a word.
__device__ __forceinline__ void digits_of(int32_t w0, int32_t w1, int32_t w2, int32_t w3,
                                          uint32_t (&digit)[kDigits]) {
  const auto balanced = [](int32_t w) {
    return (static_cast<uint32_t>(w) + 0x808080u) ^ 0x808080u;
  };
  const uint32_t t0 = balanced(w0), t1 = balanced(w1), t2 = balanced(w2), t3 = balanced(w3);
  const uint32_t low01 = permute_bytes(t0, t1, 0x5140), low23 = permute_bytes(t2, t3, 0x5140);
  digit[0] = permute_bytes(low01, low23, 0x5410);
  digit[1] = permute_bytes(low01, low23, 0x7632);
  digit[2] = permute_bytes(permute_bytes(t0, t1, 0x0062), permute_bytes(t2, t3, 0x0062), 0x5410);
}

// Outputs and rows of x of a block: 8 warps of 16 outputs each, or 4 by 2 of 16 outputs and half of
// the rows.
template <int Batch>
struct Rectangle {
  static constexpr int kOutputs = Batch == 8 ? 128 : 64;
  static constexpr int kAcross = kOutputs / 16;         // warps side by side
  static constexpr int kPieces = Batch * kAcross / 64;  // of 8 rows of x a warp
};

// A block owns a rectangle of outputs and rows of x over one split of the sum. A step of both
// factors is in shared memory at a time: weights are decoded once, as digits, the summed index
// innermost; then a warp multiplies 16 outputs with 8 or 32 rows of x on the tensor cores.
template <class Word, int Batch, bool Back, int Block>
__global__ void __launch_bounds__(kThreads) integer_kernel(Integers p) {
  using R = Rectangle<Batch>;
  alignas(16) __shared__ int8_t weights[kDigits][R::kOutputs][kPitch];
  alignas(16) __shared__ int8_t x[Batch][kPitch];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t across = (p.outputs + R::kOutputs - 1) / R::kOutputs;
  const int64_t o0 = blockIdx.x % across * R::kOutputs, b0 = blockIdx.x / across * Batch;
  const int64_t k0 = blockIdx.y * p.split, k1 = min(p.length, k0 + p.split);
  const int mine = warp % R::kAcross * 16 + lane / 4, four = lane % 4 * 4;
  const int first = warp / R::kAcross * R::kPieces * 8;
  int32_t sum[kDigits][R::kPieces][4] = {};
  const auto put = [&](int o, int k, const uint32_t (&digit)[kDigits]) {
#pragma unroll
    for (int d = 0; d < kDigits; ++d) *reinterpret_cast<uint32_t*>(&weights[d][o][k]) = digit[d];
  };

  for (int64_t k = k0; k < k1; k += kStep) {
    __syncthreads();
    for (int n = thread; n < Batch * (kStep / 16); n += kThreads) {
      const int b = n / (kStep / 16), at = n % (kStep / 16) * 16;
      uint4 bytes = make_uint4(0, 0, 0, 0);
      if (b0 + b < p.m) bytes = *reinterpret_cast<const uint4*>(p.x + (b0 + b) * p.stride + k + at);
      *reinterpret_cast<uint4*>(&x[b][at]) = bytes;
    }
    uint32_t digit[kDigits];
    if constexpr (Back) {
      // Neighbouring threads read neighbouring columns of four rows.
      for (int n = thread; n < R::kOutputs / 4 * (kStep / 4); n += kThreads) {
        const int o = n % (R::kOutputs / 4) * 4, at = n / (R::kOutputs / 4) * 4;
        int32_t w[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) four_weights<Word, Block>(p, k + at + i, o0 + o, w[i]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          digits_of(w[0][j], w[1][j], w[2][j], w[3][j], digit);
          put(o + j, at, digit);
        }
      }
    } else {
      for (int n = thread; n < R::kOutputs * (kStep / 4); n += kThreads) {
        const int o = n / (kStep / 4), at = n % (kStep / 4) * 4;
        int32_t w[4];
        four_weights<Word, Block>(p, o0 + o, k + at, w);
        digits_of(w[0], w[1], w[2], w[3], digit);
        put(o, at, digit);
      }
    }
    __syncthreads();
#pragma unroll
    for (int part = 0; part < kStep; part += 32) {
      uint32_t b[R::kPieces][2];
#pragma unroll
      for (int n = 0; n < R::kPieces; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          b[n][h] = *reinterpret_cast<const uint32_t*>(
              &x[first + 8 * n + lane / 4][part + 16 * h + four]);
#pragma unroll
      for (int d = 0; d < kDigits; ++d) {
        uint32_t a[4];
#pragma unroll
        for (int h = 0; h < 4; ++h)
          a[h] = *reinterpret_cast<const uint32_t*>(
              &weights[d][mine + 8 * (h & 1)][part + 16 * (h >> 1) + four]);
#pragma unroll
        for (int n = 0; n < R::kPieces; ++n) multiply_int8(sum[d][n], a, b[n]);
      }
    }
  }

#pragma unroll
  for (int n = 0; n < R::kPieces; ++n)
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      const int64_t o = o0 + mine + 8 * (h >> 1), row = b0 + first + 8 * n + lane % 4 * 2 + (h & 1);
      if (o >= p.outputs || row >= p.m) continue;
      const int64_t all =
          sum[0][n][h] + int64_t{256} * sum[1][n][h] + int64_t{65536} * sum[2][n][h];
      if (p.sums)
        atomicAdd(p.sums + row * p.outputs + o, static_cast<Sum>(all));
      else
        p.y[row * p.outputs + o] = scaled(all, p, row, Word::kShift);
    }
}

// A thread owns one output at a time.
__global__ void __launch_bounds__(kThreads) scale_kernel(Integers p, int shift) {
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; n < p.m * p.outputs;
       n += static_cast<int64_t>(gridDim.x) * kThreads)
    p.y[n] = scaled(static_cast<int64_t>(p.sums[n]), p, n / p.outputs, shift);
}

int64_t aligned(int64_t bytes) { return round_up(bytes, 128); }

// Sizes of a product, and where its scratch is.
template <class Word, bool Back>
struct Plan {
  int batch;
  int64_t vectors, bytes;
  unsigned tiles;
  Integers p{};

  Plan(const LayerView& layer, int64_t m, void* scratch) {
    p.layer = layer;
    p.m = m;
    p.outputs = Back ? layer.in : layer.out;
    p.length = Back ? layer.out : layer.in;
    p.stride = round_up(p.length, kStep);
    batch = m <= 8 ? 8 : 64;
    const int outputs = batch == 8 ? Rectangle<8>::kOutputs : Rectangle<64>::kOutputs;
    const int64_t all = (p.outputs + outputs - 1) / outputs * ((m + batch - 1) / batch);
    tiles = static_cast<unsigned>(all);
    // Two blocks for every multiprocessor, of at least four steps each.
    const int64_t wanted = std::min((2 * processors() + all - 1) / all, p.stride / (4 * kStep));
    p.splits = std::max<int64_t>({1, wanted, (p.length + kLongestSum - 1) / kLongestSum});
    p.split = round_up((p.length + p.splits - 1) / p.splits, kStep);
    p.splits = (p.length + p.split - 1) / p.split;
    vectors = Word::kVectors * layer.tile.cols;
    char* at = static_cast<char*>(scratch);
    bytes = 0;
    const auto take = [&](int64_t size) {
      char* here = at + bytes;
      bytes += aligned(size);
      return here;
    };
    p.units = reinterpret_cast<float*>(take(m * 4));
    p.basis_unit = reinterpret_cast<float*>(take(4));
    p.basis = reinterpret_cast<int8_t*>(take(vectors));
    p.x = reinterpret_cast<int8_t*>(take(m * p.stride));
    if (p.splits > 1) p.sums = reinterpret_cast<Sum*>(take(m * p.outputs * 8));
  }
};

template <class Word, bool Back>
int64_t scratch_bytes(const LayerView& layer, int64_t m) {
  return Plan<Word, Back>(layer, m, nullptr).bytes;
}

template <class Word, bool Back>
cudaError_t product(const LayerView& layer, const void* x, Type, int64_t m, float* y, void* scratch,
                    cudaStream_t stream) {
  Plan<Word, Back> plan(layer, m, scratch);
  Integers& p = plan.p;
  p.y = y;
  cudaError_t error =
      quantise_rows(static_cast<const float*>(x), m, p.length, p.stride, p.x, p.units, stream);
  if (error == cudaSuccess)
    error = quantise_rows(layer.params[kCyclicBasis], 1, plan.vectors, plan.vectors, p.basis,
                          p.basis_unit, stream);
  if (error == cudaSuccess && p.sums)
    error = cudaMemsetAsync(p.sums, 0, static_cast<size_t>(m * p.outputs) * sizeof(Sum), stream);
  if (error != cudaSuccess) return error;
  const auto of_block = [&]<int Block>() {
    const auto kernel = plan.batch == 8 ? integer_kernel<Word, 8, Back, Block>
                                        : integer_kernel<Word, 64, Back, Block>;
    return run(kernel, dim3(plan.tiles, static_cast<unsigned>(p.splits)), kThreads, 0, stream, p);
  };
  const int64_t block = layer.tile.cols;
  error = block == kUsualBlock ? of_block.template operator()<kUsualBlock>()
          : block % 4 == 0     ? of_block.template operator()<4>()
                               : of_block.template operator()<1>();
  if (error != cudaSuccess || !p.sums) return error;
  return run(scale_kernel, blocks_for(m * p.outputs, kThreads), kThreads, 0, stream, p,
             Word::kShift);
}

}  // namespace

template <class Word>
void cyclic_integer_slots(CudaRow& row) {
  row.takes_float = true;
  row.linear = product<Word, false>;
  row.linear_scratch = scratch_bytes<Word, false>;
  row.grad_input = product<Word, true>;
  row.grad_input_scratch = scratch_bytes<Word, true>;
  row.linear_max_m = row.grad_input_max_m = std::numeric_limits<int64_t>::max();
}

template void cyclic_integer_slots<Cyclic16Word>(CudaRow&);
template void cyclic_integer_slots<CyclicCompoundWord>(CudaRow&);
template void cyclic_integer_slots<Cyclic32Word>(CudaRow&);

}  // namespace rs::cuda
