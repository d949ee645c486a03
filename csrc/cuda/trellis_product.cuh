// Products with a trellis straight from its codes, on tensor cores: a state's two weights are one
// register of an mma operand, so the lanes decode the operand where it is needed.
#pragma once

#include <algorithm>

#include "trellis.cuh"
#include "trellis_slots.h"

namespace rs::cuda {

// Every lane has its own copy of the table, in its own bank, so that no lookup waits for another.
constexpr int kTableBytes = kPoints * 32 * 4;

template <class T>
__device__ void fill_table(const LayerView& layer, const Directions& directions, uint4* table) {
  for (int e = threadIdx.x; e < kPoints; e += blockDim.x) {
    const uint32_t pair = pack<T>(directions.point(layer, e));
    const uint4 four = make_uint4(pair, pair, pair, pair);
    for (int c = 0; c < 8; ++c) table[8 * e + (c + threadIdx.x) % 8] = four;
  }
}

// The weights 2n and 2n + 1 of a quarter as two T. `column` is 4 * lane: the copy to ask.
template <int K>
__device__ __forceinline__ uint32_t quarter_pair(const uint32_t (&words)[K + 1], int n,
                                                 const unsigned char* table, uint32_t column) {
  const uint32_t p = quarter_hash<K>(words, n);
  const uint32_t at = (p << 2 & (kPoints - 1) << 7) | column;
  return *reinterpret_cast<const uint32_t*>(table + at) ^ (p & kSigns);
}

// How a product is cut: `groups` of outputs, each a sum over `steps`; a block takes 1 / splits of a
// group's steps at a time, and a warp every kWarps-th of those.
struct Cut {
  int groups, steps, splits;

  RS_HD int items() const { return groups * splits; }
  RS_HD int begin(int item) const {
    return static_cast<int>(static_cast<int64_t>(item % splits) * steps / splits);
  }
  RS_HD int end(int item) const {
    return static_cast<int>((static_cast<int64_t>(item % splits) + 1) * steps / splits);
  }
};

// As few splits as leave no more than a fifth of the rounds of blocks idle.
inline Cut cut(int64_t groups, int64_t steps, int warps, int64_t blocks) {
  const int64_t most = std::clamp<int64_t>(steps / warps, 1, 64);
  int64_t best = 1;
  double best_share = 0;
  for (int64_t s = 1; s <= most && best_share < 0.8; ++s) {
    const int64_t items = groups * s, rounds = (items + blocks - 1) / blocks;
    const double share = static_cast<double>(items) / static_cast<double>(rounds * blocks);
    if (share > best_share) best = s, best_share = share;
  }
  return {static_cast<int>(groups), static_cast<int>(steps), static_cast<int>(best)};
}

// A warp's way through the product: what it reads next. Divisions only from item to item.
template <class Side>
struct Walk {
  int item, step, end;
  const uint8_t* codes;  // of the lane's quarter at step 0

  __device__ __forceinline__ void enter(const LayerView& layer, const Cut& cut, int lane) {
    for (; item < cut.items(); item += gridDim.x) {
      step = cut.begin(item) + static_cast<int>(threadIdx.x) / 32;
      end = cut.end(item);
      codes = layer.codes + Side::tile(layer, item / cut.splits, lane) * (16 * Side::kBits) +
              Side::quarter(lane) * (4 * Side::kBits);
      if (step < end) return;
    }
  }
  __device__ __forceinline__ void advance(const LayerView& layer, const Cut& cut, int lane) {
    step += Side::kWarps;
    if (step < end) return;
    item += gridDim.x;
    enter(layer, cut, lane);
  }
};

// A block owns groups of outputs for one share of the sum and a table of 32 copies, a warp every
// kWarps-th step, a lane a quarter of a tile a step; codes are read once, kAhead steps before they
// are needed. The warps' sums are added in their order.
template <class Side>
__global__ void __launch_bounds__(32 * Side::kWarps, 1)
    product_kernel(LayerView layer, Cut cut, const typename Side::T* __restrict__ x, int64_t m,
                   float* __restrict__ y) {
  constexpr int K = Side::kBits, kWarps = Side::kWarps, kAhead = 2;
  auto* table = dynamic_shared<unsigned char>();
  auto* sums = reinterpret_cast<float*>(table + kTableBytes);
  const int lane = lane_id(), warp = threadIdx.x / 32;
  const int64_t batch0 = static_cast<int64_t>(blockIdx.y) * Side::kBatch;
  const int batch = static_cast<int>(min(m - batch0, static_cast<int64_t>(Side::kBatch)));
  x += batch0 * Side::from(layer);

  // The quarters that come next, and where they belong; past the end, item is cut.items() or more.
  uint32_t ahead[kAhead][K];
  int ahead_item[kAhead], ahead_step[kAhead];
  Walk<Side> walk{static_cast<int>(blockIdx.x), 0, 0, nullptr};
  walk.enter(layer, cut, lane);
  const auto fetch = [&](int a) {
    ahead_item[a] = walk.item;
    ahead_step[a] = walk.step;
    if (walk.item >= cut.items()) return;
    load_quarter<K>(walk.codes + Side::tiles(layer, walk.step, lane) * (16 * K), ahead[a]);
    walk.advance(layer, cut, lane);
  };
#pragma unroll
  for (int a = 0; a < kAhead; ++a) fetch(a);

  auto& directions = *reinterpret_cast<Directions*>(sums);
  directions.turn(layer);
  __syncthreads();
  fill_table<typename Side::T>(layer, directions, reinterpret_cast<uint4*>(table));
  __syncthreads();

  int parity = 0;
  for (int item = blockIdx.x; item < cut.items(); item += gridDim.x) {
    float sum[Side::kRounds][2][4] = {};
    while (ahead_item[0] == item) {
      const int step = ahead_step[0];
      uint32_t words[K + 1];
#pragma unroll
      for (int i = 0; i < K; ++i) words[i] = ahead[0][i];
#pragma unroll
      for (int a = 1; a < kAhead; ++a) {
        ahead_item[a - 1] = ahead_item[a];
        ahead_step[a - 1] = ahead_step[a];
#pragma unroll
        for (int i = 0; i < K; ++i) ahead[a - 1][i] = ahead[a][i];
      }
      fetch(kAhead - 1);
      words[K] = __shfl_sync(0xFFFFFFFFu, words[0], Side::beyond(lane));
      Side::add(layer, words, table, x, batch, step, lane, sum);
    }
    const int group = item / cut.splits;
    float* part = y + (item % cut.splits * m + batch0) * Side::to(layer);
#pragma unroll
    for (int round = 0; round < Side::kRounds; ++round, parity ^= 1) {
      float* all = sums + parity * kWarps * 256;
#pragma unroll
      for (int i = 0; i < 8; ++i) all[(warp * 8 + i) * 32 + lane] = sum[round][i / 4][i % 4];
      __syncthreads();
      for (int e = threadIdx.x; e < 256; e += 32 * kWarps) {
        float total = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) total += all[w * 256 + e];
        int row;
        const int64_t at = Side::output(group, round, e / 32, e % 32, &row);
        if (row < batch && at < Side::to(layer)) part[row * Side::to(layer) + at] = total;
      }
    }
  }
}

// y = the sum of `splits` parts, in their order.
cudaError_t add_parts(const float* parts, int splits, int64_t count, float* y, cudaStream_t stream);

template <class Side>
Cut cut_of(const LayerView& layer) {
  return cut(Side::groups(layer), Side::steps(layer), Side::kWarps, processors());
}

template <class Side>
int64_t product_scratch(const LayerView& layer, int64_t m) {
  const int splits = cut_of<Side>(layer).splits;
  return splits > 1 ? splits * m * Side::to(layer) * static_cast<int64_t>(sizeof(float)) : 0;
}

template <class Side>
cudaError_t product(const LayerView& layer, const void* x, int64_t m, float* y, void* scratch,
                    cudaStream_t stream) {
  const Cut cut = cut_of<Side>(layer);
  float* to = cut.splits > 1 ? static_cast<float*>(scratch) : y;
  const dim3 grid(static_cast<unsigned>(std::min(cut.items(), processors())),
                  static_cast<unsigned>((m + Side::kBatch - 1) / Side::kBatch));
  constexpr size_t kShared = kTableBytes + 2 * Side::kWarps * 256 * sizeof(float);
  if (const cudaError_t error = run(product_kernel<Side>, grid, 32 * Side::kWarps, kShared, stream,
                                    layer, cut, static_cast<const typename Side::T*>(x), m, to);
      error != cudaSuccess || cut.splits == 1)
    return error;
  return add_parts(to, cut.splits, m * Side::to(layer), y, stream);
}

// Calls visit(Side<K, N, T>{}) for the activations' type and the least N of Counts with 8 N >= m,
// or the last.
template <template <int, int, class> class Side, int K, int N, int... Counts, class Visit>
auto with_side(Type type, int64_t m, Visit&& visit) {
  if constexpr (sizeof...(Counts) > 0) {
    if (m > 8 * N) return with_side<Side, K, Counts...>(type, m, visit);
  }
  return type == Type::float16 ? visit(Side<K, N, Fp16>{}) : visit(Side<K, N, Bf16>{});
}

}  // namespace rs::cuda
