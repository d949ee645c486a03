#include "viterbi.h"

#include <array>
#include <climits>

#include "grid.cuh"
#include "ptx.cuh"

namespace rs::cuda {
namespace {

using namespace viterbi;

constexpr int kThreads = 1024;
constexpr int kTiles = 2;  // that a block takes through the trellis together
constexpr int kStates = 1 << 16;
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

// The error of a state less what depends on the target alone, plus a metric, in the CPU's rounding:
// -mulhrs(u, a) is (u * -a + 0x3FFF) >> 15. Aims are targets times -1. Sums that would leave int16
// at the top, which takes a target beyond 1.5 R, are held there as the CPU does if kWide.
struct Fine {
  static constexpr bool kNorms = true;

  __device__ static Target target(float a, float b) { return fine_target(a, b); }
  __device__ static bool wide(const Target& t) { return t.a * t.a + t.b * t.b > 24500 * 24500; }
  __device__ static int2 aim(const Target& t) { return make_int2(-t.a, -t.b); }
  __device__ static uint32_t point(float u, float v, int16_t* norm) {
    int16_t values[3];
    fine_point(u, v, values);
    *norm = values[2];
    return static_cast<uint16_t>(values[0]) | static_cast<uint32_t>(values[1]) << 16;
  }

  int u, v, norm;
  __device__ Fine(uint32_t point, int norm)
      : u(static_cast<int16_t>(point)), v(static_cast<int>(point) >> 16), norm(norm) {}
  template <bool kWide>
  __device__ int cost(const int2& aim, int metric) const {
    const int along_u = (u * aim.x + 0x3FFF) >> 15, along_v = (v * aim.y + 0x3FFF) >> 15;
    if constexpr (kWide) return min(min(norm + along_u, kTop) + along_v, kTop) + metric;
    return norm + metric + along_u + along_v;
  }
};

// The norm in the word above the bytes of u and v, which aims are zero for.
struct Coarse {
  static constexpr bool kNorms = false;

  __device__ static Target target(float a, float b) { return coarse_target(a, b); }
  __device__ static bool wide(const Target& t) { return abs(t.a) + abs(t.b) > 155; }
  __device__ static int2 aim(const Target& t) {
    return make_int2((-t.a & 255) | (-t.b & 255) << 8, 0);
  }
  __device__ static uint32_t point(float u, float v, int16_t*) {
    int16_t values[2];
    coarse_point(u, v, values);
    return static_cast<uint16_t>(values[0]) | static_cast<uint32_t>(values[1]) << 16;
  }

  uint32_t word;
  int norm;
  __device__ Coarse(uint32_t point, int) : word(point), norm(static_cast<int>(point) >> 16) {}
  template <bool kWide>
  __device__ int cost(const int2& aim, int metric) const {
    if constexpr (kWide) return min(dot_bytes(word, aim.x, norm), kTop) + metric;
    return dot_bytes(word, aim.x, norm + metric);
  }
};

// One for each state: what a Grain's point() makes. `norm` is for the fine grain alone.
struct Points {
  uint32_t word[kStates];
  int16_t norm[kStates];
};

// A block makes the directions, each thread one state's point.
template <class Grain>
__global__ void __launch_bounds__(256)
    points_kernel(const float* __restrict__ radius, const float* __restrict__ angle,
                  Points* __restrict__ points) {
  __shared__ float cosine[kTrellisAngles], sine[kTrellisAngles];
  if (threadIdx.x < kTrellisAngles)
    polar_direction(angle[threadIdx.x], &cosine[threadIdx.x], &sine[threadIdx.x]);
  __syncthreads();
  const float largest = largest_radius(radius);
  const uint32_t state = blockIdx.x * 256 + threadIdx.x, p = state * kTrellisMultiplier;
  const uint32_t phase = p >> 27 & 15, amp = p >> 21 & 63;
  const float u = mul(radius[amp], cosine[phase]), v = mul(radius[amp], sine[phase]);
  points->word[state] = Grain::point((p >> 31 ? -u : u) / largest, (p >> 15 & 1 ? -v : v) / largest,
                                     &points->norm[state]);
}

struct Problem {
  TrellisTargets targets;
  int seam;
  const Points* points;
  uint32_t* choices;  // kSteps * kRuns * kChoices words for each block
  uint8_t* codes;
};

// What a pass over some steps of the ring keeps in shared memory beside the metrics.
struct Pass {
  int2 aim[kSteps][kTiles];
  int bound[kSteps + 1][kTiles];
  bool wide[kSteps][kTiles];
  int low[kLows][kTiles];  // the least metric before step t is in t % 3
  int overlap[kTiles];
  uint8_t dropped[kSteps][kTiles];
};

// Both tiles' targets for `steps` steps from `begin` on; behind the last tile zeros.
template <class Grain>
__device__ void aim_at(const Problem& problem, float largest, int64_t first, int begin, int steps,
                       Pass& pass) {
  const TrellisTargets& t = problem.targets;
  const int64_t across = t.in / 16, tiles = t.out / 16 * across;
  for (int i = threadIdx.x; i < steps * kTiles; i += kThreads) {
    const int step = i / kTiles, tile = i % kTiles, pair = (begin + step) % kSteps;
    const int64_t n = first + tile;
    float a = 0, b = 0;
    if (n < tiles) {
      const float* w = t.w + (n / across * 16 + pair / 8) * t.in + n % across * 16 + pair % 8 * 2;
      a = in_radii(w[0], largest);
      b = in_radii(w[1], largest);
    }
    const Target target = Grain::target(a, b);
    pass.aim[step][tile] = Grain::aim(target);
    pass.bound[step][tile] = target.bound;
    pass.wide[step][tile] = Grain::wide(target);
  }
  if (threadIdx.x < kTiles) pass.bound[steps][threadIdx.x] = 0;
  __syncthreads();
}

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
    metrics[o] = both(held && o != pass.overlap[0] ? kTop : start[0],
                      held && o != pass.overlap[1] ? kTop : start[1]);
  if (threadIdx.x < kTiles) {
    pass.low[0][threadIdx.x] = start[threadIdx.x];
    pass.low[1][threadIdx.x] = kTop;
  }
  __syncthreads();
}

// One step of both tiles. Of equal paths the lowest dropped value wins, being the low byte of what
// is minimised. choices: the step's, or null for not wanted.
template <class Grain, int K, bool kWide>
__device__ __forceinline__ void advance(const Points& points, const int2* aims, const int* drop,
                                        const uint32_t* from, uint32_t* to, uint32_t* choices,
                                        int* lowest) {
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
          const int cost = point.template cost<kWide>(aim[tile], metric_of(before, tile));
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
        const int held = max(min((best[tile][o] >> 8) - drop[tile], kTop), kBottom);
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
    if (pass.wide[t][0] || pass.wide[t][1])
      advance<Grain, K, true>(points, pass.aim[t], drop, from, to, kept, lowest);
    else
      advance<Grain, K, false>(points, pass.aim[t], drop, from, to, kept, lowest);
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

// The ring is the dropped bits of its states in order; a thread writes one word of it.
template <int K>
__device__ void pack(const Pass& pass, int64_t first, int64_t tiles, uint8_t* codes) {
  for (int i = threadIdx.x; i < 8 * K * kTiles; i += kThreads) {
    const int tile = i / (8 * K), word = i % (8 * K);
    if (first + tile >= tiles) continue;
    uint32_t bits = 0;
    for (int n = 16 * word; n < 16 * word + 16; ++n)
      bits = bits << 1 | (pass.dropped[n / K][tile] >> (K - 1 - n % K) & 1);
    uint8_t* at = codes + (first + tile) * 16 * K + 2 * word;
    at[0] = static_cast<uint8_t>(bits);
    at[1] = static_cast<uint8_t>(bits >> 8);
  }
}

// A block owns two tiles at a time and its own choices in global memory, a thread a run of overlaps
// (divided further where there are few): the points are read once a step for both tiles, metrics
// stay in shared memory. A free pass around the ring's start settles the overlap there, a second
// pass is held to it at both ends.
template <class Grain, int K>
__global__ void __launch_bounds__(kThreads, 1) search_kernel(Problem problem) {
  using C = Cut<K>;
  __shared__ Pass pass;
  uint32_t* metrics = dynamic_shared<uint32_t>();
  uint32_t* choices =
      problem.choices + static_cast<int64_t>(blockIdx.x) * (kSteps * C::kRuns * C::kChoices);
  const Points& points = *problem.points;
  const float largest = largest_radius(problem.targets.radius);
  const int64_t tiles = problem.targets.out / 16 * (problem.targets.in / 16);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kTiles; first < tiles;
       first += static_cast<int64_t>(gridDim.x) * kTiles) {
    const int seam = problem.seam;
    aim_at<Grain>(problem, largest, first, kSteps - seam, 2 * seam, pass);
    begin_pass<K>(false, pass, metrics);
    find_end<K>(forward<Grain, K>(points, pass, 2 * seam, seam, metrics, choices), pass);
    back<K>(choices, seam, 2 * seam, pass);

    aim_at<Grain>(problem, largest, first, 0, kSteps, pass);
    begin_pass<K>(true, pass, metrics);
    forward<Grain, K>(points, pass, kSteps, 0, metrics, choices);
    back<K>(choices, 0, kSteps, pass);
    pack<K>(pass, first, tiles, problem.codes);
    __syncthreads();
  }
}

unsigned blocks_of(const TrellisTargets& targets) {
  const int64_t pairs = (targets.tiles() + kTiles - 1) / kTiles;
  return static_cast<unsigned>(std::min<int64_t>(pairs, processors()));
}

template <class Grain, int K>
cudaError_t search_tiles(Problem problem, cudaStream_t stream) {
  const TrellisTargets& t = problem.targets;
  if (const cudaError_t error = run(points_kernel<Grain>, kStates / 256, 256, 0, stream, t.radius,
                                    t.angle, const_cast<Points*>(problem.points));
      error != cudaSuccess)
    return error;
  return run(search_kernel<Grain, K>, blocks_of(t), kThreads,
             2 * sizeof(uint32_t) * Cut<K>::kOverlaps, stream, problem);
}

// Words of choices for each block.
constexpr std::array<int64_t, 6> kWords = [] {
  const auto words = []<int K>(std::integral_constant<int, K>) {
    return int64_t{kSteps} * Cut<K>::kRuns * Cut<K>::kChoices;
  };
  return std::array<int64_t, 6>{
      words(std::integral_constant<int, 3>()), words(std::integral_constant<int, 4>()),
      words(std::integral_constant<int, 5>()), words(std::integral_constant<int, 6>()),
      words(std::integral_constant<int, 7>()), words(std::integral_constant<int, 8>())};
}();

using Launch = cudaError_t (*)(Problem, cudaStream_t);
constexpr Launch kFine[6] = {search_tiles<Fine, 3>, search_tiles<Fine, 4>, search_tiles<Fine, 5>,
                             search_tiles<Fine, 6>, search_tiles<Fine, 7>, search_tiles<Fine, 8>};
constexpr Launch kCoarsely[4] = {search_tiles<Coarse, 3>, search_tiles<Coarse, 4>,
                                 search_tiles<Coarse, 5>, search_tiles<Coarse, 6>};

}  // namespace

int64_t viterbi_scratch(const TrellisTargets& targets, int k) {
  return static_cast<int64_t>(sizeof(Points)) +
         blocks_of(targets) * kWords[k - 3] * static_cast<int64_t>(sizeof(uint32_t));
}

cudaError_t viterbi(const TrellisTargets& targets, int k, Search search, uint8_t* codes,
                    void* scratch, cudaStream_t stream) {
  if (!targets.tiles()) return cudaSuccess;
  auto* points = static_cast<Points*>(scratch);
  const Problem problem{targets, seam_of(k, search), points,
                        reinterpret_cast<uint32_t*>(points + 1), codes};
  return (is_coarse(k, search) ? kCoarsely[k - 3] : kFine[k - 3])(problem, stream);
}

}  // namespace rs::cuda
