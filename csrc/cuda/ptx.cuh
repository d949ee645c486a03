// Instructions that C++ has no words for, each with its meaning in plain C++ for the emulation of
// the tests, and for the host half of a kernel's file, which is never called.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace rs::cuda {

// Four bytes chosen from the eight of (high, low) by the nibbles of `select`.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t select) {
#ifdef __CUDA_ARCH__
  return __byte_perm(low, high, select);
#else
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i)
    out |= static_cast<uint32_t>(both >> (8 * (select >> (4 * i) & 7)) & 255) << (8 * i);
  return out;
#endif
}

// Bits [shift, shift + 32) of (high, low); shift below 32.
__device__ __forceinline__ uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t shift) {
#ifdef __CUDA_ARCH__
  return __funnelshift_r(low, high, shift);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
#endif
}

// sum plus the four unsigned bytes of `points` times the four signed ones of `aim`, pair by pair.
__device__ __forceinline__ int dot_bytes(uint32_t points, int aim, int sum) {
#ifdef __CUDA_ARCH__
  int out;  // the compiler's own __dp4a takes two of one sign
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(out) : "r"(points), "r"(aim), "r"(sum));
  return out;
#else
  for (int i = 0; i < 4; ++i)
    sum += static_cast<int>(points >> (8 * i) & 255) *
           static_cast<int8_t>(static_cast<uint32_t>(aim) >> (8 * i));
  return sum;
#endif
}

// The least of the warp's values, in every lane.
__device__ __forceinline__ int warp_min(int x) {
#ifdef __CUDA_ARCH__
  return __reduce_min_sync(0xFFFFFFFFu, x);
#elif defined(RS_EMULATED_CUDA)
  const int* all = emulation::exchange(x);
  for (int lane = 0; lane < 32; ++lane) x = all[lane] < x ? all[lane] : x;
  return x;
#else
  return x;
#endif
}

}  // namespace rs::cuda
