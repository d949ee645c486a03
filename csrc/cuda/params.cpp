// linear_grad_params and decode_grad_params on CUDA tensors, once for every codec.
#include "../cpu/ops.h"
#include "layers.h"

namespace rs::cuda {
namespace {

constexpr int64_t kSlice = int64_t{1} << 23;  // weights whose gradient is made at a time

// Gradients of the frame's scales from dw (rows, in) in the outer basis, which becomes dLoss/dP.
//   W = out_scale * P * in_scale with P = H_out T H_in
void scale_gradients(const DeviceTerm& term, int64_t r, const at::Tensor& dw, at::TensorList params,
                     const Tensors& grads) {
  const Row& row = *term.row;
  if (row.out_scale < 0 && row.in_scale < 0) return;
  const int64_t real = std::min(dw.size(0), term.shape.out - r);
  const at::Tensor p = at::empty({dw.size(0), term.layer.in}, term.floats());
  term.decode(r, r + dw.size(0), p);
  rotate(term, p);
  at::Tensor d = dw.narrow(0, 0, real).narrow(1, 0, term.shape.in);
  const at::Tensor product = p.narrow(0, 0, real).narrow(1, 0, term.shape.in) * d;
  at::Tensor so, si;
  if (row.out_scale >= 0) so = params[row.out_scale].narrow(0, r, real).unsqueeze(1);
  if (row.in_scale >= 0) si = params[row.in_scale];
  if (so.defined())
    grads[row.out_scale].narrow(0, r, real).add_((si.defined() ? product * si : product).sum(1));
  if (si.defined()) grads[row.in_scale].add_((so.defined() ? product * so : product).sum(0));
  if (so.defined()) d.mul_(so);
  if (si.defined()) d.mul_(si);
}

// Gradients of all params given dLoss/dW, of which `fill(r, dw)` writes rows r and on into
// dw (rows, in).
template <class Fill>
Tensors grad_params(const DeviceTerms& all, at::TensorList params, Fill&& fill) {
  Tensors found;
  for (const at::Tensor& p : params)
    found.push_back(p.scalar_type() == at::kFloat ? at::zeros(p.sizes(), p.options())
                                                  : at::empty({0}, p.options().dtype(at::kFloat)));
  const Shape shape = all.bound.shape;
  if (!shape.out || !shape.in) return found;
  for (size_t t = 0; t < all.terms.size(); ++t) {
    const DeviceTerm& term = all.terms[t];
    const LayerView& layer = term.layer;
    const int64_t first = (*all.bound.terms)[t].first_param;
    const auto count = static_cast<int64_t>(term.row->params.size());
    const Tensors grads(found.begin() + first, found.begin() + first + count);
    float* pointers[kMostParams] = {};
    for (int64_t i = 0; i < count; ++i)
      pointers[i] = grads[i].numel() ? grads[i].mutable_data_ptr<float>() : nullptr;
    const at::Tensor sums = at::zeros({term.cuda.sum_bytes}, term.codes.options());
    const int64_t rows = term.slice_rows(kSlice);
    const at::Tensor buffer = at::empty({rows, layer.in}, term.floats());
    for (int64_t r = 0; r < layer.out; r += rows) {
      const int64_t n = std::min(rows, layer.out - r), real = std::min(n, shape.out - r);
      const at::Tensor dw = buffer.narrow(0, 0, n);
      if (real < n || shape.in < layer.in) dw.zero_();
      fill(r, dw.narrow(0, 0, real).narrow(1, 0, shape.in));
      scale_gradients(term, r, dw, params.slice(first, count), grads);
      if (!term.cuda.adjoint) continue;
      rotate(term, dw);
      const at::Tensor largest =
          term.cuda.sum_bytes ? at::linalg_vector_norm(dw, INFINITY) : at::Tensor();
      launch(dw, [&](cudaStream_t stream) {
        return term.cuda.adjoint(layer, r / layer.tile.rows, (r + n) / layer.tile.rows,
                                 dw.const_data_ptr<float>(),
                                 largest.defined() ? largest.const_data_ptr<float>() : nullptr,
                                 sums.mutable_data_ptr(), pointers, stream);
      });
    }
    if (term.cuda.finish)
      launch(sums, [&](cudaStream_t stream) {
        return term.cuda.finish(layer, sums.const_data_ptr(), pointers, stream);
      });
  }
  return found;
}

Tensors linear_grad_params_op(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& codes,
                              at::TensorList params, c10::string_view codec,
                              at::IntArrayRef sizes) {
  check_place("x", x, codes, codec);
  check_place("grad", grad, codes, codec);
  const DeviceTerms all = bind_terms(codes, params, codec, sizes);
  const auto [out, in] = all.bound.shape;
  check_batches(grad, x, out, in, codec);
  const auto type = exact() ? at::kFloat : x.scalar_type() == at::kHalf ? at::kHalf : at::kBFloat16;
  const at::Tensor x_rows = flat(x, in).to(type), g_rows = flat(grad, out).to(type);
  return grad_params(all, params, [&](int64_t r, at::Tensor dw) {
    dw.copy_(at::mm(g_rows.narrow(1, r, dw.size(0)).t(), x_rows));
  });
}

Tensors decode_grad_params_op(const at::Tensor& grad, const at::Tensor& codes,
                              at::TensorList params, c10::string_view codec,
                              at::IntArrayRef sizes) {
  check_place("grad", grad, codes, codec);
  const DeviceTerms all = bind_terms(codes, params, codec, sizes);
  check_weight_gradient(grad, sizes, codec);
  return grad_params(all, params,
                     [&](int64_t r, at::Tensor dw) { dw.copy_(grad.narrow(0, r, dw.size(0))); });
}

}  // namespace
}  // namespace rs::cuda

RS_CUDA_IMPL(m) {
  m.impl("linear_grad_params", rs::cuda::linear_grad_params_op);
  m.impl("decode_grad_params", rs::cuda::decode_grad_params_op);
}
