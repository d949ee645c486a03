// What every op on CUDA tensors does around its kernels: the tensors' device, torch's current
// stream, one check of the launch.
#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace rs::cuda {

// Calls kernel(stream), which returns a cudaError_t, on the device of `like`.
template <class Kernel>
void launch(const at::Tensor& like, Kernel&& kernel) {
  const c10::cuda::CUDAGuard guard(like.device());
  C10_CUDA_CHECK(kernel(c10::cuda::getCurrentCUDAStream().stream()));
}

}  // namespace rs::cuda
