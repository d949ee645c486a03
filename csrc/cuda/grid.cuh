// Launching a kernel, dynamic shared memory, and the storage types of activations.
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cstdint>
#include <type_traits>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "types.h"

namespace rs::cuda {

// Launches kernel(args...) on the stream; `shared` bytes of dynamic shared memory.
template <class... P, class... A>
cudaError_t run(void (*kernel)(P...), dim3 blocks, unsigned threads, size_t shared,
                cudaStream_t stream, A&&... args) {
  if (shared > (size_t{48} << 10))  // more has to be asked for
    if (const cudaError_t error = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
        error != cudaSuccess)
      return error;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
}

// Multiprocessors of the current device.
inline int processors() {
  int device = 0, count = 1;
  if (cudaGetDevice(&device) == cudaSuccess)
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// The block's dynamic shared memory as an array of T.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef RS_EMULATED_CUDA
  return reinterpret_cast<T*>(emulation::dynamic_shared());
#else
  extern __shared__ __align__(128) unsigned char rs_dynamic_shared[];
  return reinterpret_cast<T*>(rs_dynamic_shared);
#endif
}

// Activations and panels as they are stored. The host spelling is for the emulation of the tests.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(Bf16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float widen(Fp16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#elif defined(__CUDACC__)
  return 0;
#else
  return static_cast<float>(std::bit_cast<_Float16>(x.bits));
#endif
}

// Rounded once, ties to even.
template <class T>
__device__ __forceinline__ T narrow(float x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else {
    T y{};
#ifdef __CUDA_ARCH__
    if constexpr (std::is_same_v<T, Bf16>)
      y.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
    else
      y.bits = __half_as_ushort(__float2half_rn(x));
#elif !defined(__CUDACC__)
    if constexpr (std::is_same_v<T, Bf16>) {
      const uint32_t bits = std::bit_cast<uint32_t>(x);
      y.bits = x != x ? 0x7FFF : static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
    } else {
      y.bits = std::bit_cast<uint16_t>(static_cast<_Float16>(x));
    }
#endif
    return y;
  }
}

// Calls visit(T{}) for the storage type.
template <class Visit>
cudaError_t with_type(Type type, Visit&& visit) {
  if (type == Type::float16) return visit(Fp16{});
  return type == Type::bfloat16 ? visit(Bf16{}) : visit(float{});
}

}  // namespace rs::cuda
