#include "viterbi.h"

#include <array>

#include "viterbi_step.cuh"

namespace rs::cuda {
namespace {

using namespace viterbi_search;

struct Problem {
  TrellisTargets targets;
  int seam;
  const Points* points;
  uint32_t* choices;  // kSteps * kRuns * kChoices words for each block
  uint8_t* codes;
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
    pass.ceiling[step][tile] = kTop - target.peak;
  }
  if (threadIdx.x < kTiles) {
    pass.bound[steps][threadIdx.x] = 0;
    pass.ceiling[steps][threadIdx.x] = kTop;
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
