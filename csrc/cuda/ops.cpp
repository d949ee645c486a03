// bit_derivative on CUDA tensors. Ops without a kernel run in plain torch (reality_stone/ops.py).
#include "../bind.h"
#include "derivative.h"
#include "launch.h"

namespace rs::cuda {
namespace {

at::Tensor bit_derivative_op(const at::Tensor& codes, int64_t order, c10::string_view name) {
  const BitLayout& layout = check_bit_derivative(codes, order, name);
  const at::Tensor in = codes.contiguous();
  at::Tensor out = at::empty(codes.sizes(), codes.options().dtype(at::kShort));
  launch(codes, [&](cudaStream_t stream) {
    return bit_derivative(layout, in.const_data_ptr<int32_t>(), static_cast<int>(order & 3),
                          in.numel(), out.mutable_data_ptr<int16_t>(), stream);
  });
  return out;
}

}  // namespace
}  // namespace rs::cuda

RS_CUDA_IMPL(m) { m.impl("bit_derivative", rs::cuda::bit_derivative_op); }
