// A pass of the trellis's search over steps of the ring: metrics in shared memory, choices in
// global memory, and the way back over them.
#pragma once

#include <climits>

#include "viterbi_grain.cuh"

namespace rs::cuda::viterbi_search {

constexpr int kThreads = 1024;
constexpr int kTiles = 2;  // that a block takes through the trellis together
constexpr int kLows = 3;

template <int N>
struct alignas(4 * N) Words {
  uint32_t word[N];
};

// How a block divides a step: a thread has a run of overlaps after the step and every kSplit-th of
// the dropped values, and does so with both tiles.
template <int K>
struct Cut {
  static constexpr int kOverlaps = 1 << (16 - K), kDropped = 1 << K;
  static constexpr int kHigh = 1 << (16 - 2 * K);  // between the metrics of two dropped values
  static constexpr int kRun = K <= 5 ? 4 : 2;
  static constexpr int kRuns = kOverlaps / kRun;
  static constexpr int kSplit = kRuns < kThreads ? kThreads / kRuns : 1;
  static constexpr int kRounds = kRuns * kSplit / kThreads;
  static constexpr int kLane = 32 / kSplit;                     // runs of a warp
  static constexpr int kField = K <= 4 ? 4 : 8;                 // bits that a choice is kept in
  static constexpr int kChoices = kRun * kTiles * kField / 32;  // words of a run's choices
};

// What a pass over some steps of the ring keeps in shared memory beside the metrics.
struct Pass {
  int2 aim[kSteps][kTiles];
  int bound[kSteps + 1][kTiles];
  int ceiling[kSteps + 1][kTiles];  // of the metrics before the step: kTop - peak
  int low[kLows][kTiles];           // the least metric before step t is in t % 3
  int overlap[kTiles];
  uint8_t dropped[kSteps][kTiles];
};

// Metrics are stored for both tiles in a word, the first tile's in its low half.
static_assert(kTiles == 2);
__device__ __forceinline__ uint32_t both(int first, int second) {
  return (static_cast<uint32_t>(first) & 0xFFFF) | static_cast<uint32_t>(second) << 16;
}
__device__ __forceinline__ int metric_of(uint32_t word, int tile) {
  return tile ? static_cast<int>(word) >> 16 : static_cast<int16_t>(word);
}

// Metrics before the first step: free, or of one overlap alone.
template <int K>
__device__ void begin_pass(bool held, Pass& pass, uint32_t* metrics) {
  const int start[kTiles] = {kBottom + pass.bound[0][0], kBottom + pass.bound[0][1]};
  for (int o = threadIdx.x; o < Cut<K>::kOverlaps; o += kThreads)
    metrics[o] = both(held && o != pass.overlap[0] ? pass.ceiling[0][0] : start[0],
                      held && o != pass.overlap[1] ? pass.ceiling[0][1] : start[1]);
  if (threadIdx.x < kTiles) {
    pass.low[0][threadIdx.x] = start[threadIdx.x];
    pass.low[1][threadIdx.x] = kTop;
  }
  __syncthreads();
}

// One step of both tiles. Of equal paths the lowest dropped value wins, being the low byte of what
// is minimised. choices: the step's, or null for not wanted.
template <class Grain, int K>
__device__ __forceinline__ void advance(const Points& points, const int2* aims, const int* drop,
                                        const int* ceiling, const uint32_t* from, uint32_t* to,
                                        uint32_t* choices, int* lowest) {
  using C = Cut<K>;
  const int lane = threadIdx.x % 32, part = lane / C::kLane;
  const int2 aim[kTiles] = {aims[0], aims[1]};
  for (int round = 0; round < C::kRounds; ++round) {
    const int run = (round * (kThreads / 32) + threadIdx.x / 32) * C::kLane + lane % C::kLane;
    const int after = run * C::kRun;
    int best[kTiles][C::kRun];
#pragma unroll
    for (int o = 0; o < C::kRun; ++o) best[0][o] = best[1][o] = kTop * 256;
    const uint32_t* metric = from + (after >> K) + part * C::kHigh;
    const uint32_t* word = points.word + part * C::kOverlaps + after;
    const int16_t* norm = points.norm + part * C::kOverlaps + after;
#pragma unroll 4
    for (int i = 0; i < C::kDropped / C::kSplit; ++i) {
      const int d = i * C::kSplit + part, next = i * C::kSplit * C::kOverlaps;
      const auto words = *reinterpret_cast<const Words<C::kRun>*>(word + next);
      Words<C::kRun / 2> norms{};
      if constexpr (Grain::kNorms)
        norms = *reinterpret_cast<const Words<C::kRun / 2>*>(norm + next);
      const uint32_t before = metric[i * C::kSplit * C::kHigh];
#pragma unroll
      for (int o = 0; o < C::kRun; ++o) {
        const Grain point(words.word[o], metric_of(norms.word[o / 2], o % 2));
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const int cost = point.cost(aim[tile], metric_of(before, tile));
          best[tile][o] = min(best[tile][o], cost * 256 + d);
        }
      }
    }
#pragma unroll
    for (int hop = C::kLane; hop < 32; hop *= 2)
#pragma unroll
      for (int o = 0; o < C::kRun; ++o)
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
          best[tile][o] = min(best[tile][o], __shfl_xor_sync(0xFFFFFFFFu, best[tile][o], hop));

    Words<C::kRun> metrics;
    Words<C::kChoices> chosen{};
#pragma unroll
    for (int o = 0; o < C::kRun; ++o) {
      int after_step[kTiles];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int held = max(min((best[tile][o] >> 8) - drop[tile], ceiling[tile]), kBottom);
        after_step[tile] = held;
        lowest[tile] = min(lowest[tile], held);
        const int at = (tile * C::kRun + o) * C::kField;
        chosen.word[at / 32] |= static_cast<uint32_t>(best[tile][o] & 255) << at % 32;
      }
      metrics.word[o] = both(after_step[0], after_step[1]);
    }
    if (part == 0) {
      *reinterpret_cast<Words<C::kRun>*>(to + after) = metrics;
      if (choices) reinterpret_cast<Words<C::kChoices>*>(choices)[run] = chosen;
    }
  }
}

// All steps of a pass; keeps the choices from `first` on. Returns the metrics after the last.
template <class Grain, int K>
__device__ const uint32_t* forward(const Points& points, Pass& pass, int steps, int first,
                                   uint32_t* metrics, uint32_t* choices) {
  using C = Cut<K>;
  for (int t = 0; t < steps; ++t) {
    const uint32_t* from = metrics + (t & 1) * C::kOverlaps;
    uint32_t* to = metrics + (~t & 1) * C::kOverlaps;
    int drop[kTiles], lowest[kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      lowest[tile] = kTop;
      drop[tile] =
          min(pass.low[t % kLows][tile] - kBottom - pass.bound[t][tile] - pass.bound[t + 1][tile],
              kTop);
    }
    uint32_t* kept = t < first ? nullptr : choices + t * (C::kRuns * C::kChoices);
    advance<Grain, K>(points, pass.aim[t], drop, pass.ceiling[t + 1], from, to, kept, lowest);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int low = warp_min(lowest[tile]);
      if (threadIdx.x % 32 == 0) atomicMin(&pass.low[(t + 1) % kLows][tile], low);
    }
    if (threadIdx.x < kTiles) pass.low[(t + 2) % kLows][threadIdx.x] = kTop;
    __syncthreads();
  }
  return metrics + (steps & 1) * C::kOverlaps;
}

// The overlap with the least metric, of equal ones the lowest.
template <int K>
__device__ void find_end(const uint32_t* metrics, Pass& pass) {
  if (threadIdx.x < kTiles) pass.overlap[threadIdx.x] = INT_MAX;
  __syncthreads();
  for (int tile = 0; tile < kTiles; ++tile) {
    int least = INT_MAX;
    for (int o = threadIdx.x; o < Cut<K>::kOverlaps; o += kThreads)
      least = min(least, metric_of(metrics[o], tile) * (1 << 13) + o);
    least = warp_min(least);
    if (threadIdx.x % 32 == 0) atomicMin(&pass.overlap[tile], least);
  }
  __syncthreads();
  if (threadIdx.x < kTiles) pass.overlap[threadIdx.x] &= (1 << 13) - 1;
  __syncthreads();
}

// A thread walks back over the choices of one tile.
template <int K>
__device__ void back(const uint32_t* choices, int first, int last, Pass& pass) {
  using C = Cut<K>;
  if (threadIdx.x < kTiles) {
    int overlap = pass.overlap[threadIdx.x];
    for (int t = last - 1; t >= first; --t) {
      const int at = (static_cast<int>(threadIdx.x) * C::kRun + overlap % C::kRun) * C::kField;
      const uint32_t word = choices[(t * C::kRuns + overlap / C::kRun) * C::kChoices + at / 32];
      const int dropped = static_cast<int>(word >> at % 32 & ((1u << C::kField) - 1));
      pass.dropped[t][threadIdx.x] = static_cast<uint8_t>(dropped);
      overlap = dropped << (16 - 2 * K) | overlap >> K;
    }
    pass.overlap[threadIdx.x] = overlap;
  }
  __syncthreads();
}

}  // namespace rs::cuda::viterbi_search
