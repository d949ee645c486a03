// Stands in for the CUDA runtime, so that the kernels of csrc/cuda run on a processor: the tests
// compile the same .cu files as C++ with this folder before all others. A block's threads are
// fibers, each run until it waits for others, in an order that a test chooses: a kernel that
// forgets a barrier gives other results in another order.
//
// Blocks run one after the other. __shared__ arrays are static, so a block's threads share them.
// Dynamic shared memory comes filled with NaNs. What the hardware alone can do is in cuda/ptx.cuh.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define RS_EMULATED_CUDA 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid value";
}
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
// Few processors, so that small matrices fill more than one wave; the shared memory of sm_90.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  return *value = which == cudaDevAttrMultiProcessorCount ? 3 : 227 * 1024, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  return std::memset(data, value, bytes), cudaSuccess;
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*)(P...), cudaFuncAttribute, int bytes) {
  return bytes <= 227 * 1024 ? cudaSuccess : cudaErrorInvalidValue;  // of an sm_90 block
}

namespace emulation {

void launch(dim3 grid, dim3 block, size_t shared, const std::function<void()>& thread);
unsigned char* dynamic_shared();
void block_barrier();
// Waits for the lanes of `mask` in this warp.
void warp_barrier(unsigned mask);
int lane();

// The values that all lanes of the warp bring to one collective; those of lanes that are not in
// `mask` are undefined. Valid until the lane's next collective but one.
unsigned char* exchange_buffer(size_t bytes);
template <class T>
const T* exchange(const T& mine, unsigned mask = 0xFFFFFFFFu) {
  T* all = reinterpret_cast<T*>(exchange_buffer(sizeof(T)));
  std::memcpy(static_cast<void*>(all + lane()), &mine, sizeof(T));
  warp_barrier(mask);
  return all;
}

// Copies of a thread that run beside it: done as late as a wait for their group allows.
void start_copy(void* to, const void* from, int bytes);
void commit_copies();
void wait_copies(size_t pending);

}  // namespace emulation

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...),
                               A&&... args) {
  if (config->gridDim.x == 0 || config->blockDim.x == 0 || config->blockDim.x > 1024 ||
      config->dynamicSmemBytes > 227 * 1024)
    return cudaErrorInvalidValue;
  emulation::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                    [&] { kernel(static_cast<P>(args)...); });
  return cudaSuccess;
}

inline void __syncthreads() { emulation::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { emulation::warp_barrier(mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T v, int from, int width = 32) {
  const int lane = emulation::lane();
  return emulation::exchange(v, mask)[(lane & ~(width - 1)) | (from & (width - 1))];
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32) {
  const int lane = emulation::lane(), from = lane ^ bits;
  const T* all = emulation::exchange(v, mask);
  return from / width == lane / width ? all[from] : v;
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  const int lane = emulation::lane(), from = lane + static_cast<int>(delta);
  const T* all = emulation::exchange(v, mask);
  return from / width == lane / width ? all[from] : v;
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  const int lane = emulation::lane(), from = lane - static_cast<int>(delta);
  const T* all = emulation::exchange(v, mask);
  return from >= 0 && from / width == lane / width ? all[from] : v;
}
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  const bool* all = emulation::exchange(predicate, mask);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) bits |= static_cast<unsigned>(all[i]) << i;
  return bits;
}
inline bool __any_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate); }
inline bool __all_sync(unsigned mask, bool predicate) {
  return __ballot_sync(mask, predicate) == mask;
}

template <class T, class V>
T atomicAdd(T* at, V value) {
  const T before = *at;
  return *at = static_cast<T>(before + static_cast<T>(value)), before;
}
template <class T>
T atomicMax(T* at, T value) {
  const T before = *at;
  return *at = before < value ? value : before, before;
}
template <class T>
T atomicMin(T* at, T value) {
  const T before = *at;
  return *at = value < before ? value : before, before;
}

template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T>
T __ldcs(const T* at) {
  return *at;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline long long __float2ll_rn(float x) { return std::llrint(x); }
inline long long __double2ll_rn(double x) { return std::llrint(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::lrint(x)); }
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
using std::fabs;
inline float fabsf(float x) { return std::fabs(x); }
