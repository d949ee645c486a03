// What the fast kernels of trellis share. A lane takes a quarter of a tile at a time: four rows, 32
// states that lie in a row in the ring, so that every state's place is known to the compiler.
#pragma once

#include "../codecs/trellis.h"
#include "grid.cuh"
#include "ptx.cuh"

namespace rs::cuda {

constexpr int kPoints = kTrellisRadii * kTrellisAngles;
enum TrellisParam { kTrellisRadius, kTrellisAngle };

// Directions of the angles, one thread each; to be followed by a barrier.
struct Directions {
  float cosine[kTrellisAngles], sine[kTrellisAngles];

  __device__ __forceinline__ void turn(const LayerView& layer) {
    const int i = threadIdx.x;
    if (i < kTrellisAngles) polar_direction(layer.params[kTrellisAngle][i], &cosine[i], &sine[i]);
  }
  // Point `index` of the code's table in the first quarter turn.
  __device__ __forceinline__ float2 point(const LayerView& layer, int index) const {
    const float radius = layer.params[kTrellisRadius][index % kTrellisRadii];
    const int phase = index / kTrellisRadii;
    return make_float2(mul(radius, cosine[phase]), mul(radius, sine[phase]));
  }
};

// A point as two T in one register, u in its low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float2 point) {
  return static_cast<uint32_t>(narrow<T>(point.y).bits) << 16 | narrow<T>(point.x).bits;
}

// The K words of a quarter at `codes`, read once: past the caches.
template <int K>
__device__ __forceinline__ void load_quarter(const uint8_t* codes, uint32_t* words) {
  if constexpr (K % 4 == 0) {
#pragma unroll
    for (int i = 0; i < K; i += 4) {
      const uint4 four = __ldcs(reinterpret_cast<const uint4*>(codes) + i / 4);
      words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
    }
  } else if constexpr (K % 2 == 0) {
#pragma unroll
    for (int i = 0; i < K; i += 2) {
      const uint2 two = __ldcs(reinterpret_cast<const uint2*>(codes) + i / 2);
      words[i] = two.x, words[i + 1] = two.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < K; ++i) words[i] = __ldcs(reinterpret_cast<const uint32_t*>(codes) + i);
  }
}

// The ring's 32 bits from half-word `half` of a quarter on, first bit most significant.
template <int K>
__device__ __forceinline__ uint32_t quarter_bits(const uint32_t (&words)[K + 1], int half) {
  const uint32_t word = words[half / 2];
  if (half == 2 * K) return word << 16;  // nobody asks for bits behind its first half
  return half % 2 ? permute_bytes(word, words[half / 2 + 1], 0x3254)
                  : permute_bytes(word, 0, 0x1032);
}

// The product of state n (0..31) of a quarter and the multiplier, from the quarter's words and the
// word behind them, whose low half counts. `n` is a constant once loops are unrolled. Shifts and
// logic are what limits the kernels, and multiplications run beside them.
template <int K>
__device__ __forceinline__ uint32_t quarter_product(const uint32_t (&words)[K + 1], int n) {
  const int half = K * n / 16, shift = K * n % 16;
  if constexpr (16 % K == 0) {
    // 32 bits are state a and, 16 / K further on, state b; their product is that of b plus 2^16
    // times that of a.
    const int first = half / 2 * 2;
    uint32_t both = quarter_bits<K>(words, first);
    if (shift) both = funnel_right(quarter_bits<K>(words, first + 2), both, 32 - shift);
    const uint32_t a = (both >> 16) * kTrellisMultiplier;
    return half == first ? a : both * kTrellisMultiplier - (a << 16);
  } else {
    const uint32_t word = words[half / 2];
    if (shift == 0) return (half % 2 ? word >> 16 : word & 0xFFFF) * kTrellisMultiplier;
    return (multiplied_left(quarter_bits<K>(words, half), shift) >> 16) * kTrellisMultiplier;
  }
}

// The hash of a quarter's state with its halves exchanged: bit 31 is the sign of v, bit 15 that of
// u, as in a packed pair, and bits 5 to 14 are the index of the point.
template <int K>
__device__ __forceinline__ uint32_t quarter_hash(const uint32_t (&words)[K + 1], int n) {
  const uint32_t p = quarter_product<K>(words, n);
  return funnel_right(p, p, 16);
}
constexpr uint32_t kSigns = 0x80008000u;

// Where the four rows of a lane's quarter are in a step of 2 x 4 tiles: lane 4 g + t has quarter
// g % 4 of tile (g / 4, t), so that four lanes have 64 columns of a row.
struct Wide {
  __device__ static int quarter(int lane) { return lane / 4 % 4; }
  // The lane that holds the next quarter of the ring.
  __device__ static int beyond(int lane) { return (lane & 19) | ((lane + 4) & 12); }
  __device__ static int row(int lane) { return lane / 16; }
  __device__ static int col(int lane) { return lane % 4; }
};

}  // namespace rs::cuda
