// Pairs of bfloat16 or float16 values in one register, the first in the low half.
#pragma once

#include "grid.cuh"
#include "ptx.cuh"

namespace rs::cuda {

template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t pair;  // one instruction, which two scalar conversions are not
  if constexpr (std::is_same_v<T, Bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return static_cast<uint32_t>(narrow<T>(high).bits) << 16 | narrow<T>(low).bits;
#endif
}

template <class T>
__device__ __forceinline__ uint32_t pair_of(float value) {
  return pack_pair<T>(value, value);
}

template <class T>
__device__ __forceinline__ float low_of(uint32_t pair) {
  return widen(T{static_cast<uint16_t>(pair)});
}
template <class T>
__device__ __forceinline__ float high_of(uint32_t pair) {
  return widen(T{static_cast<uint16_t>(pair >> 16)});
}

// a + b, each half rounded once. As a fused product with one: sm_80 adds no bfloat16 pairs.
template <class T>
__device__ __forceinline__ uint32_t add_pairs(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint32_t sum;
  if constexpr (std::is_same_v<T, Bf16>)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3F803F80u), "r"(b));
  else
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
#else
  return pack_pair<T>(low_of<T>(a) + low_of<T>(b), high_of<T>(a) + high_of<T>(b));
#endif
}

}  // namespace rs::cuda
