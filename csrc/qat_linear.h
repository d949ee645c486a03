// The op qat_linear, a product with a weight that is quantized on the way, and its backward.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <tuple>

#include "qat.h"

namespace rs::qat {

// Arguments checked, contiguous and alive.
struct Call {
  Settings settings;
  at::Tensor weight, centers, scale;  // scale: (1,) or (out,), ones where none was given
};

// ValueError or TypeError unless every argument is as formulas.py wants it.
Call check(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& centers, double tau,
           c10::string_view mode, const std::optional<at::Tensor>& scale);

// ValueError unless grad is as y of x, (..., out).
void check_gradient(const at::Tensor& grad, const at::Tensor& x, int64_t out);

std::tuple<at::Tensor, at::Tensor> qat_linear(const at::Tensor& x, const at::Tensor& weight,
                                              const at::Tensor& centers, double tau,
                                              c10::string_view mode,
                                              const std::optional<at::Tensor>& scale);

// Gradients of x, weight, centers and scale, empty where not wanted.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> qat_linear_backward(
    const at::Tensor& grad, const at::Tensor& grad_loss, const at::Tensor& x,
    const at::Tensor& weight, const at::Tensor& centers, double tau, c10::string_view mode,
    const std::optional<at::Tensor>& scale, std::array<bool, 4> wanted);

}  // namespace rs::qat
