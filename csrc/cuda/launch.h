// What every op on CUDA tensors does around its kernels: the tensors' device, torch's current
// stream, one check of the launch.
#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "types.h"

// Where the kernels are registered. The emulation of the tests puts them beside the CPU's.
#ifndef RS_CUDA_LIBRARY
#define RS_CUDA_LIBRARY reality_stone, CUDA
#endif
#define RS_CUDA_IMPL_(...) TORCH_LIBRARY_IMPL(__VA_ARGS__)
#define RS_CUDA_IMPL(module) RS_CUDA_IMPL_(RS_CUDA_LIBRARY, module)

namespace rs::cuda {

// Calls kernel(stream), which returns a cudaError_t, on the device of `like`.
template <class Kernel>
void launch(const at::Tensor& like, Kernel&& kernel) {
  const c10::cuda::CUDAGuard guard(like.device());
  C10_CUDA_CHECK(kernel(c10::cuda::getCurrentCUDAStream().stream()));
}

inline Type type_of(const at::Tensor& x) {
  if (x.scalar_type() == at::kHalf) return Type::float16;
  return x.scalar_type() == at::kBFloat16 ? Type::bfloat16 : Type::float32;
}

}  // namespace rs::cuda
