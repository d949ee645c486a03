// The op qat_linear on CUDA tensors: panels of rows are quantized by our kernels and multiplied by
// torch. Weights that are not finite make the loss NaN: looking would wait for the device.
#include "../qat_linear.h"
#include "launch.h"
#include "qat_linear.h"

namespace rs::cuda {
namespace {

constexpr int64_t kPanel = int64_t{1} << 24;  // weights quantized at a time

at::Tensor flat(const at::Tensor& x, int64_t features) {
  return x.reshape({features ? x.numel() / features : 0, features}).contiguous();
}

int64_t panel_rows(int64_t out, int64_t in) {
  return std::min(out, std::max<int64_t>(1, kPanel / in));
}

WeightRows rows_of(const qat::Call& call, int64_t first, int64_t n) {
  const bool per_row = call.scale.numel() != 1;
  const int64_t in = call.weight.size(1);
  return {call.weight.const_data_ptr<float>() + first * in,
          call.scale.const_data_ptr<float>() + (per_row ? first : 0), per_row, n, in};
}

std::tuple<at::Tensor, at::Tensor> qat_linear(const at::Tensor& x, const at::Tensor& weight,
                                              const at::Tensor& centers, double tau,
                                              c10::string_view mode,
                                              const std::optional<at::Tensor>& scale) {
  const c10::cuda::CUDAGuard guard(x.device());
  const qat::Call call = qat::check(x, weight, centers, tau, mode, scale);
  const int64_t out = weight.size(0), in = weight.size(1);
  auto sizes = x.sizes().vec();
  sizes.back() = out;
  at::Tensor loss = at::zeros({}, weight.options());
  if (!out || !in) return {at::zeros(sizes, x.options()), loss};

  const at::Tensor inside = flat(x, in);
  at::Tensor y = at::empty({inside.size(0), out}, x.options());
  const int64_t rows = panel_rows(out, in);
  const at::Tensor buffer = at::empty({rows, in}, x.options());
  const at::Tensor errors = at::empty({out}, weight.options().dtype(at::kDouble));
  double* parts = errors.mutable_data_ptr<double>();
  for (int64_t r = 0; r < out; r += rows) {
    const int64_t n = std::min(rows, out - r);
    const at::Tensor panel = buffer.narrow(0, 0, n);
    launch(x, [&](cudaStream_t stream) {
      return quantize_rows(call.settings, rows_of(call, r, n), panel.mutable_data_ptr(), type_of(x),
                           parts + r, stream);
    });
    at::Tensor part = y.narrow(1, r, n);
    at::mm_out(part, inside, panel.t());
  }
  const double weights = static_cast<double>(out) * static_cast<double>(in);
  launch(x, [&](cudaStream_t stream) {
    return sum_parts(parts, out, 1, 1 / weights, loss.mutable_data_ptr<float>(), stream);
  });
  return {y.view(sizes), loss};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> qat_linear_backward(
    const at::Tensor& grad, const at::Tensor& grad_loss, const at::Tensor& x,
    const at::Tensor& weight, const at::Tensor& centers, double tau, c10::string_view mode,
    const std::optional<at::Tensor>& scale, std::array<bool, 4> wanted) {
  const c10::cuda::CUDAGuard guard(x.device());
  const qat::Call call = qat::check(x, weight, centers, tau, mode, scale);
  const int64_t out = weight.size(0), in = weight.size(1);
  qat::check_gradient(grad, x, out);
  const auto [want_x, want_weight, want_centers, want_scale] = wanted;
  const bool sums = want_weight || want_centers || want_scale;
  const auto none = [&] { return at::empty({0}, weight.options()); };  // no two results alike
  at::Tensor dx = want_x ? at::zeros(x.sizes(), x.options()) : none();
  at::Tensor dw = sums ? at::empty_like(call.weight) : none();
  at::Tensor dcenters = want_centers ? at::zeros_like(call.centers) : none();
  at::Tensor dscale = want_scale ? at::zeros_like(call.scale) : none();
  if (!out || !in) return {dx, want_weight ? dw : none(), dcenters, dscale};

  const at::Tensor inside = flat(x, in), g = flat(grad.to(x.scalar_type()), out);
  const at::Tensor dloss = grad_loss.to(weight.options()).contiguous();
  const double weights = static_cast<double>(out) * static_cast<double>(in);
  const int64_t rows = panel_rows(out, in), count = call.settings.count;
  const auto wide = weight.options().dtype(at::kDouble);
  const at::Tensor level_sums = at::empty({want_centers ? out : 0, count}, wide);
  const at::Tensor scale_sums = at::empty({out}, wide);
  const at::Tensor buffer = want_x ? at::empty({rows, in}, x.options()) : none();
  at::Tensor dx_sum = want_x ? at::empty({inside.size(0), in}, weight.options()) : none();
  for (int64_t r = 0; r < out; r += rows) {
    const int64_t n = std::min(rows, out - r);
    const at::Tensor g_part = g.narrow(1, r, n);
    const at::Tensor panel = want_x ? buffer.narrow(0, 0, n) : none();
    void* q = want_x ? panel.mutable_data_ptr() : nullptr;
    if (sums) dw.narrow(0, r, n).copy_(at::mm(g_part.t(), inside));
    launch(x, [&](cudaStream_t stream) {
      if (!sums)
        return quantize_rows(call.settings, rows_of(call, r, n), q, type_of(x),
                             scale_sums.mutable_data_ptr<double>() + r, stream);
      double* levels = want_centers ? level_sums.mutable_data_ptr<double>() + r * count : nullptr;
      return quantize_rows_backward(call.settings, rows_of(call, r, n),
                                    dloss.const_data_ptr<float>(), weights,
                                    dw.mutable_data_ptr<float>() + r * in, q, type_of(x), levels,
                                    scale_sums.mutable_data_ptr<double>() + r, stream);
    });
    if (!want_x) continue;
    const at::Tensor part = at::mm(g_part, panel);
    if (r)
      dx_sum.add_(part);
    else
      dx_sum.copy_(part);
  }
  if (want_x) dx = dx_sum.to(x.scalar_type()).view(x.sizes());
  launch(x, [&](cudaStream_t stream) {
    if (want_centers)
      if (const cudaError_t error =
              sum_parts(level_sums.const_data_ptr<double>(), out, static_cast<int>(count), 1,
                        dcenters.mutable_data_ptr<float>(), stream);
          error != cudaSuccess)
        return error;
    if (!want_scale || call.scale.numel() != 1) return cudaSuccess;
    return sum_parts(scale_sums.const_data_ptr<double>(), out, 1, 1,
                     dscale.mutable_data_ptr<float>(), stream);
  });
  if (want_scale && call.scale.numel() != 1) dscale.copy_(scale_sums);
  return {dx, want_weight ? dw : none(), dcenters, dscale};
}

}  // namespace
}  // namespace rs::cuda

RS_CUDA_IMPL(m) {
  m.impl("qat_linear", rs::cuda::qat_linear);
  m.impl("qat_linear_backward", rs::cuda::qat_linear_backward);
}
