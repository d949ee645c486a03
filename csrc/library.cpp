// Schemas of the ops and their CPU kernels. Shape rules and derivatives are in
// reality_stone/ops.py.
#include <torch/library.h>

#include "cpu/ops.h"
#include "qat_linear.h"

TORCH_LIBRARY(reality_stone, m) {
  m.def(
      "encode(Tensor weight, Tensor? importance, Tensor[] params, str codec) -> (Tensor, "
      "Tensor[])");
  m.def("decode(Tensor codes, Tensor[] params, str codec, int[] shape) -> Tensor");
  m.def("linear(Tensor x, Tensor codes, Tensor[] params, str codec, int[] shape) -> Tensor");
  m.def(
      "linear_grad_input(Tensor grad, Tensor codes, Tensor[] params, str codec, int[] shape) -> "
      "Tensor");
  m.def(
      "linear_grad_params(Tensor grad, Tensor x, Tensor codes, Tensor[] params, str codec, int[] "
      "shape) -> Tensor[]");
  m.def(
      "decode_grad_params(Tensor grad, Tensor codes, Tensor[] params, str codec, int[] shape) -> "
      "Tensor[]");
  m.def("check_codes(Tensor codes, Tensor[] params, str codec, int[] shape) -> ()");
  m.def("hadamard(Tensor x, int block) -> Tensor");
  m.def(
      "trellis_encode(Tensor targets, Tensor radius, Tensor angle, float bits, str search) -> "
      "Tensor");
  m.def("bit_derivative(Tensor codes, int order, str layout) -> Tensor");
  m.def(
      "qat_linear(Tensor x, Tensor weight, Tensor centers, float tau, str mode, Tensor? "
      "scale=None) -> (Tensor, Tensor)");
  m.def(
      "qat_linear_backward(Tensor grad, Tensor grad_loss, Tensor x, Tensor weight, Tensor "
      "centers, float tau, str mode, Tensor? scale, bool[4] wanted) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
}

TORCH_LIBRARY_IMPL(reality_stone, CPU, m) {
  m.impl("encode", rs::encode);
  m.impl("decode", rs::decode);
  m.impl("linear", rs::linear);
  m.impl("linear_grad_input", rs::linear_grad_input);
  m.impl("linear_grad_params", rs::linear_grad_params);
  m.impl("decode_grad_params", rs::decode_grad_params);
  m.impl("check_codes", rs::check_codes);
  m.impl("hadamard", rs::hadamard);
  m.impl("trellis_encode", rs::trellis_encode);
  m.impl("bit_derivative", rs::bit_derivative);
  m.impl("qat_linear", rs::qat::qat_linear);
  m.impl("qat_linear_backward", rs::qat::qat_linear_backward);
}
