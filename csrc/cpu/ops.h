// The ops on CPU tensors, written once for every codec around its row of slots.
#pragma once

#include <ATen/ATen.h>

#include <tuple>
#include <vector>

namespace rs {

using Tensors = std::vector<at::Tensor>;

std::tuple<at::Tensor, Tensors> encode(const at::Tensor& weight,
                                       const std::optional<at::Tensor>& importance,
                                       at::TensorList params, c10::string_view codec);
at::Tensor decode(const at::Tensor& codes, at::TensorList params, c10::string_view codec,
                  at::IntArrayRef shape);
at::Tensor linear(const at::Tensor& x, const at::Tensor& codes, at::TensorList params,
                  c10::string_view codec, at::IntArrayRef shape);
at::Tensor linear_grad_input(const at::Tensor& grad, const at::Tensor& codes, at::TensorList params,
                             c10::string_view codec, at::IntArrayRef shape);
Tensors linear_grad_params(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& codes,
                           at::TensorList params, c10::string_view codec, at::IntArrayRef shape);
// The gradient of every param given dLoss/dW = grad (out, in): the adjoint of decode.
Tensors decode_grad_params(const at::Tensor& grad, const at::Tensor& codes, at::TensorList params,
                           c10::string_view codec, at::IntArrayRef shape);
at::Tensor hadamard(const at::Tensor& x, int64_t block);
at::Tensor trellis_encode(const at::Tensor& targets, const at::Tensor& radius,
                          const at::Tensor& angle, double bits, c10::string_view search);
at::Tensor bit_derivative(const at::Tensor& codes, int64_t order, c10::string_view layout);
void check_codes(const at::Tensor& codes, at::TensorList params, c10::string_view codec,
                 at::IntArrayRef shape);

// automatic: bfloat16 and 16-bit integers where they are fast; exact: float32 everywhere; int8: as
// automatic, with activations in 8 bits where a codec has such a product.
enum class Accuracy { automatic, exact, int8 };
void set_accuracy(Accuracy mode);
Accuracy accuracy();
inline bool exact() { return accuracy() == Accuracy::exact; }

// Called between chunks of long work on the calling thread; may throw to stop it.
using Progress = void (*)(int64_t done, int64_t total);
void set_progress_hook(Progress hook);

}  // namespace rs
