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

// Dynamic shared memory of a launch, and the most that any launch of the kernel takes: what is
// allowed is kept with the kernel, where a thread with a smaller launch must not take it back.
struct SharedBytes {
  size_t used, most;

  SharedBytes(size_t bytes) : used(bytes), most(bytes) {}
  SharedBytes(size_t used, size_t most) : used(used), most(most) {}
};

// Launches kernel(args...) on the stream.
template <class... P, class... A>
cudaError_t run(void (*kernel)(P...), dim3 blocks, unsigned threads, SharedBytes shared,
                cudaStream_t stream, A&&... args) {
  // More than 48 KB has to be asked for; what the kernel declares counts too.
  if (shared.most > (size_t{32} << 10))
    if (const cudaError_t error = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared.most));
        error != cudaSuccess)
      return error;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared.used;
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
