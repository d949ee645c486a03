// The gradients of params: dLoss/dW block by block, through the frame, to the adjoint slots.
#include <algorithm>

#include "../bind.h"
#include "clones.h"
#include "ops.h"
#include "parallel.h"
#include "terms.h"

namespace rs {
namespace {

// Private gradient buffers of one block of rows: params sliced along out are written in place
// (blocks own disjoint rows), the others are summed over blocks in order, so threads change no bit.
struct BlockGrads {
  std::vector<std::vector<float>> own;
  std::vector<float*> pointers;

  BlockGrads(const Row& row, const Tensors& grads) {
    for (size_t i = 0; i < row.params.size(); ++i) {
      const bool sliced = row.params[i].axis == Axis::out || row.params[i].axis == Axis::both;
      own.emplace_back(sliced ? 0 : static_cast<size_t>(grads[i].numel()), 0.0f);
      float* whole = grads[i].numel() ? grads[i].data_ptr<float>() : nullptr;
      pointers.push_back(sliced ? whole : own.back().data());
    }
  }
  void add_to(Tensors& grads) const {
    for (size_t i = 0; i < own.size(); ++i)
      for (size_t j = 0; j < own[i].size(); ++j) grads[i].data_ptr<float>()[j] += own[i][j];
  }
};

// One row of W = so * p * si: adds dLoss/dsi, turns d from dLoss/dW into dLoss/dp, returns
// dLoss/dso.
RS_CLONES float scale_gradients(const float* p, float* d, int64_t n, float so, const float* si,
                                float* dsi) {
  constexpr int64_t kLanes = 16;  // partial sums in a fixed order, whatever the vector width
  float lanes[kLanes] = {};
  auto one = [&](int64_t j, int64_t lane) {
    const float scale = si ? si[j] : 1.0f, product = p[j] * d[j];
    lanes[lane] += product * scale;
    if (dsi) dsi[j] += product * so;
    d[j] *= so * scale;
  };
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) one(j + lane, lane);
  for (; j < n; ++j) one(j, j % kLanes);
  float sum = 0;
  for (float lane : lanes) sum += lane;
  return sum;
}

// dW of one block of rows in the outer basis -> gradients of the frame's scales, then of T's
// params.
//   W = out_scale * P * in_scale with P = H_out T H_in
void block_grad_params(const Row& row, const Layer& layer, Shape shape, int64_t r, int64_t rows,
                       float* dw, float* block, const BlockGrads& grads) {
  const int64_t in = layer.in;
  const float *out_scale = param(layer, row.out_scale), *in_scale = param(layer, row.in_scale);
  if (out_scale || in_scale) {
    row.decode(layer, r, r + rows, block);
    rotate(row, block, rows, in, shape.in);
    for (int64_t i = 0; i < std::min(rows, shape.out - r); ++i) {
      const float sum = scale_gradients(block + i * in, dw + i * in, shape.in,
                                        out_scale ? out_scale[r + i] : 1.0f, in_scale,
                                        in_scale ? grads.pointers[row.in_scale] : nullptr);
      if (out_scale) grads.pointers[row.out_scale][r + i] += sum;
    }
  }
  rotate(row, dw, rows, in, shape.in);
  row.adjoint(layer, r, r + rows, dw, grads.pointers.data());
}

// Gradients of all params given dLoss/dW, of which `fill(r, dw)` writes rows r and on into
// dw (rows, in).
template <class Fill>
Tensors grad_params(const Bound& bound, at::TensorList params, Fill&& fill) {
  Tensors all;
  for (const at::Tensor& p : params)
    all.push_back(p.scalar_type() == at::kFloat ? at::zeros(p.sizes(), p.options())
                                                : at::empty({0}));
  if (!bound.shape.out || !bound.shape.in) return all;
  for (size_t t = 0; t < bound.layers.size(); ++t) {
    const Term& term = (*bound.terms)[t];
    const Row& row = term.row;
    const Layer& layer = bound.layers[t];
    Tensors grads(all.begin() + term.first_param,
                  all.begin() + term.first_param + row.params.size());
    const int64_t unit = block_rows(row);
    // A block is at least this many rows, so that shared gradients stay few.
    const int64_t block = round_up(std::min<int64_t>(128, layer.out), unit);
    const int64_t step = std::max<int64_t>(1, (int64_t{1} << 22) / (block * layer.in)) * block;
    // One buffer for all steps: fresh ones of this size stay in the heap and pile up.
    const at::Tensor buffer = at::zeros({std::min(step, layer.out), layer.in});
    for (int64_t r0 = 0; r0 < layer.out; r0 += step) {
      const int64_t rows = std::min(step, layer.out - r0),
                    real = std::min(rows, bound.shape.out - r0);
      at::Tensor dw = buffer.narrow(0, 0, rows);
      if (real < rows || bound.shape.in < layer.in) dw.zero_();
      fill(r0, dw.narrow(0, 0, real).narrow(1, 0, bound.shape.in));
      const int64_t blocks = (rows + block - 1) / block;
      std::vector<BlockGrads> partial;
      for (int64_t b = 0; b < blocks; ++b) partial.emplace_back(row, grads);
      parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(static_cast<size_t>(block * layer.in));
        for (int64_t b = begin; b < end; ++b) {
          const int64_t at = b * block;
          block_grad_params(row, layer, bound.shape, r0 + at, std::min(block, rows - at),
                            dw.data_ptr<float>() + at * layer.in, scratch.data(), partial[b]);
        }
      });
      for (const BlockGrads& p : partial) p.add_to(grads);
    }
  }
  return all;
}

}  // namespace

Tensors linear_grad_params(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& codes,
                           at::TensorList params, c10::string_view codec, at::IntArrayRef sizes) {
  const Bound bound = bind_layers(codes, params, codec, sizes);
  const auto [out, in] = bound.shape;
  check_batches(grad, x, out, in, codec);
  const auto type = bf16_panels() ? at::kBFloat16 : at::kFloat;
  const at::Tensor x_rows = flat(x, in).to(type), g_rows = flat(grad, out).to(type);
  at::Tensor product;
  return grad_params(bound, params, [&](int64_t r, at::Tensor dw) {
    const at::Tensor g = g_rows.narrow(1, r, dw.size(0)).t();
    if (dw.scalar_type() == type && dw.is_contiguous()) {
      at::mm_out(dw, g, x_rows);
      return;
    }
    if (!product.defined() || product.size(0) < dw.size(0)) product = at::empty(dw.sizes(), type);
    at::Tensor narrow = product.narrow(0, 0, dw.size(0));
    dw.copy_(at::mm_out(narrow, g, x_rows));
  });
}

Tensors decode_grad_params(const at::Tensor& grad, const at::Tensor& codes, at::TensorList params,
                           c10::string_view codec, at::IntArrayRef sizes) {
  const Bound bound = bind_layers(codes, params, codec, sizes);
  check_weight_gradient(grad, sizes, codec);
  return grad_params(bound, params,
                     [&](int64_t r, at::Tensor dw) { dw.copy_(grad.narrow(0, r, dw.size(0))); });
}

}  // namespace rs
