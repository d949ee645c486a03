// The two grains of the trellis's search: what a state's point is kept as, and what it costs.
#pragma once

#include "../codecs/trellis_search.h"
#include "grid.cuh"
#include "ptx.cuh"

namespace rs::cuda::viterbi_search {

using namespace rs::viterbi;

constexpr int kStates = 1 << 16;

// The error of a state less what depends on the target alone, plus a metric, in the CPU's rounding:
// -mulhrs(u, a) is (u * -a + 0x3FFF) >> 15. Aims are targets times -1.
struct Fine {
  static constexpr bool kNorms = true;

  __device__ static Target target(float a, float b) { return fine_target(a, b); }
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
  __device__ int cost(const int2& aim, int metric) const {
    return norm + metric + ((u * aim.x + 0x3FFF) >> 15) + ((v * aim.y + 0x3FFF) >> 15);
  }
};

// The norm in the word above the bytes of u and v, which aims are zero for.
struct Coarse {
  static constexpr bool kNorms = false;

  __device__ static Target target(float a, float b) { return coarse_target(a, b); }
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
  __device__ int cost(const int2& aim, int metric) const {
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

}  // namespace rs::cuda::viterbi_search
