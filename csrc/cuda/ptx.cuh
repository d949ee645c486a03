// Instructions that C++ has no words for, each with its meaning in plain C++ for the emulation of
// the tests, and for the host half of a kernel's file, which is never called.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "grid.cuh"

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

// threadIdx.x % 32 in a block of one dimension. As a remainder the compiler would take it anew,
// with a mask, wherever it is joined to other bits.
__device__ __forceinline__ int lane_id() {
#ifdef __CUDA_ARCH__
  int lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
#elif defined(RS_EMULATED_CUDA)
  return emulation::lane();
#else
  return 0;
#endif
}

// x << shift, kept apart from a shift behind it: the compiler would make one shift and one mask of
// both, which run in one pipe, while this one is a multiplication, in another.
__device__ __forceinline__ uint32_t multiplied_left(uint32_t x, int shift) {
#ifdef __CUDA_ARCH__
  uint32_t out;
  asm("mul.lo.u32 %0, %1, %2;" : "=r"(out) : "r"(x), "r"(1u << shift));
  return out;
#else
  return x << shift;
#endif
}

// d (16, 8) += a (16, 16) @ b (16, 8), T by T into float32, spread over a warp. Lane 4 g + t holds
// of a, pairs of columns: a[0] row g, columns 2t and 2t + 1; a[1] row g + 8; a[2], a[3] the same
// eight columns on; of b column g: b0 rows 2t and 2t + 1, b1 eight on; of d columns 2t and 2t + 1
// of row g, then of row g + 8.
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, Bf16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif defined(RS_EMULATED_CUDA)
  struct Fragments {
    uint32_t a[4], b[2];
  };
  const Fragments* all = emulation::exchange(Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int lane = emulation::lane();
  const auto half = [](uint32_t pair, int k) {
    return widen(T{static_cast<uint16_t>(pair >> (k % 2 * 16))});
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int t = k % 8 / 2, far = k / 8;
      d[i] += half(all[row * 4 + t].a[i / 2 + 2 * far], k) * half(all[column * 4 + t].b[far], k);
    }
  }
#endif
}

}  // namespace rs::cuda
