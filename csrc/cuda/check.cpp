// check_codes on CUDA tensors: the host's check on a copy. It reads every code once, when a file is
// loaded.
#include "../cpu/ops.h"
#include "launch.h"

namespace rs::cuda {
namespace {

void check_codes_op(const at::Tensor& codes, at::TensorList params, c10::string_view codec,
                    at::IntArrayRef shape) {
  Tensors copies;
  for (const at::Tensor& param : params) copies.push_back(param.cpu());
  check_codes(codes.cpu(), copies, codec, shape);
}

}  // namespace
}  // namespace rs::cuda

RS_CUDA_IMPL(m) { m.impl("check_codes", rs::cuda::check_codes_op); }
