// From op arguments to layers: every check of codes and params, once for all devices and codecs.
#pragma once

#include <ATen/ATen.h>

#include <memory>
#include <vector>

#include "codec.h"
#include "derivative.h"

namespace rs {

// Makes Term::device. Set by cuda/layers.cpp where that is part of the library.
extern std::shared_ptr<const void> (*device_row)(const Term&);

// A codec resolved for a shape; kept and shared, since batch-1 products ask for it every call.
std::shared_ptr<const std::vector<Term>> resolve_cached(c10::string_view codec, Shape shape);

// The terms of one call with their data. Holds contiguous versions of the tensors.
struct Bound {
  std::shared_ptr<const std::vector<Term>> terms;
  std::vector<Layer> layers;  // one per term
  Shape shape;
  std::vector<at::Tensor> alive;
};

Shape check_shape(c10::string_view codec, at::IntArrayRef shape);
Bound bind_layers(const at::Tensor& codes, at::TensorList params, c10::string_view codec,
                  at::IntArrayRef shape);
// x must be float32, float16 or bfloat16 with `features` as its last size.
void check_activation(const char* name, const at::Tensor& x, int64_t features,
                      c10::string_view codec);
// Of the gradients of params: grad (..., out) and x (..., in) of the same batch; dLoss/dW.
void check_batches(const at::Tensor& grad, const at::Tensor& x, int64_t out, int64_t in,
                   c10::string_view codec);
void check_weight_gradient(const at::Tensor& grad, at::IntArrayRef shape, c10::string_view codec);
void check_hadamard(const at::Tensor& x, int64_t block);
// Of bit_derivative: the layout's row, for codes that are int32 and an order that is not negative.
const BitLayout& check_bit_derivative(const at::Tensor& codes, int64_t order,
                                      c10::string_view layout);

void check_finite(const at::Tensor& weight, c10::string_view codec);
// Of trellis_encode; returns 2 * bits. Reads the targets.
int check_trellis_encode(const at::Tensor& targets, const at::Tensor& radius,
                         const at::Tensor& angle, double bits, c10::string_view search);

// What encoding starts from, on the weight's device: codes of zeros and copies of the params, some
// of which a codec fits. Reads the importance and the weight, which must be finite.
struct Encoding {
  std::shared_ptr<const std::vector<Term>> terms;  // one
  at::Tensor codes;
  std::vector<at::Tensor> params;
  at::Tensor importance;  // one number per padded column, or undefined

  const Row& row() const { return terms->front().row; }
};
Encoding begin_encoding(const at::Tensor& weight, const std::optional<at::Tensor>& importance,
                        at::TensorList params, c10::string_view codec);
// The weight in padded sizes without the frame's scales, whose Hadamard transforms are still to do.
// A scale of zero stands for a zero row or column.
at::Tensor without_scales(const at::Tensor& weight, const Encoding& encoding);

}  // namespace rs
