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

// sum += a @ b on the tensor cores: a (16, 32) and b (32, 8) of int8, sum (16, 8) of int32. Lane
// 4g+t holds of a, four bytes each, rows g, g+8, g, g+8 from columns 4t, 4t, 4t+16, 4t+16 on; of b
// column g from rows 4t, 4t+16 on; of the sum (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
__device__ __forceinline__ void multiply_int8(int32_t (&sum)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[2]) {
#ifdef __CUDA_ARCH__
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif defined(RS_EMULATED_CUDA)
  struct Fragments {
    uint32_t a[4], b[2];
  };
  const Fragments* all = emulation::exchange(Fragments{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const auto byte = [](uint32_t word, int k) {
    return static_cast<int32_t>(static_cast<int8_t>(word >> (8 * (k & 3))));
  };
  for (int i = 0; i < 4; ++i) {
    const int row = emulation::lane() / 4 + 8 * (i >> 1),
              column = emulation::lane() % 4 * 2 + (i & 1);
    for (int k = 0; k < 32; ++k)
      sum[i] += byte(all[row % 8 * 4 + k % 16 / 4].a[row / 8 + 2 * (k / 16)], k) *
                byte(all[column * 4 + k % 16 / 4].b[k / 16], k);
  }
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

// Starts copying `Bytes` (4, 8 or 16) from global to shared memory past the registers. Both
// addresses are multiples of Bytes.
template <int Bytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
#ifdef __CUDA_ARCH__
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (Bytes == 16)  // past the first-level cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(Bytes)
                 : "memory");
#elif defined(RS_EMULATED_CUDA)
  emulation::start_copy(shared, global, Bytes);
#endif
}

// Closes a group of this thread's copies; wait_copies<n> waits for all but its last n groups.
__device__ __forceinline__ void commit_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif defined(RS_EMULATED_CUDA)
  emulation::commit_copies();
#endif
}
template <int Pending>
__device__ __forceinline__ void wait_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#elif defined(RS_EMULATED_CUDA)
  emulation::wait_copies(Pending);
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
