// decode, linear, linear_grad_input and hadamard on CUDA tensors, once for every codec.
#include "../cpu/ops.h"
#include "frame.h"
#include "layers.h"

namespace rs::cuda {
namespace {

// Weights decoded at a time: as bfloat16 they stay in the second-level cache (50 MB on a H200)
// until the product has read them.
constexpr int64_t kSlice = int64_t{1} << 23;

at::Tensor decode_op(const at::Tensor& codes, at::TensorList params, c10::string_view codec,
                     at::IntArrayRef shape) {
  const DeviceTerms all = bind_terms(codes, params, codec, shape);
  at::Tensor w = at::zeros(shape, codes.options().dtype(at::kFloat));
  if (!w.numel()) return w;
  for (const DeviceTerm& term : all.terms) {
    const int64_t rows = term.slice_rows(kSlice);
    const at::Tensor buffer = at::empty({rows, term.layer.in}, term.floats());
    for (int64_t r = 0; r < term.layer.out; r += rows) {
      const int64_t n = std::min(rows, term.layer.out - r), real = std::min(n, shape[0] - r);
      const at::Tensor t = buffer.narrow(0, 0, n);
      term.decode(r, r + n, t);
      rotate(term, t);
      const float* out_scale = term.param(term.row->out_scale);
      launch(codes, [&](cudaStream_t stream) {
        return scale_rows(t.const_data_ptr<float>(), term.layer.in, real, shape[1],
                          out_scale ? out_scale + r : nullptr, term.param(term.row->in_scale),
                          &term != &all.terms.front(), w.mutable_data_ptr<float>() + r * shape[1],
                          stream);
      });
    }
  }
  return w;
}

// What a product is computed in: float16 stays so, other activations become bfloat16.
at::ScalarType product_type(const at::Tensor& x) {
  if (exact()) return at::kFloat;
  return x.scalar_type() == at::kHalf ? at::kHalf : at::kBFloat16;
}

// A slot straight from the codes: (layer, x, type, m, y, scratch, stream). How much scratch it
// needs depends on the device.
template <class Slot, class Scratch>
at::Tensor direct(const DeviceTerm& term, Slot slot, Scratch scratch, const at::Tensor& x,
                  int64_t width) {
  const c10::cuda::CUDAGuard guard(x.device());
  const int64_t m = x.size(0), bytes = scratch ? scratch(term.layer, m) : 0;
  const at::Tensor y = at::empty({m, width}, term.floats()),
                   space = at::empty({bytes}, term.codes.options());
  launch(x, [&](cudaStream_t stream) {
    return slot(term.layer, x.const_data_ptr(), type_of(x), m, y.mutable_data_ptr<float>(),
                space.mutable_data_ptr(), stream);
  });
  return y;
}

at::Tensor term_linear(const DeviceTerm& term, const at::Tensor& x, at::ScalarType result) {
  const Row& row = *term.row;
  const CudaRow& cuda = term.cuda;
  const bool straight = cuda.linear && x.size(0) <= cuda.linear_max_m && !exact();
  const auto type = straight && cuda.takes_float ? at::kFloat : product_type(x);
  const at::Tensor inside = through_frame(x, term.shape.in, term.layer.in, term.param(row.in_scale),
                                          row.in_block, nullptr, type);
  at::Tensor y;
  if (straight) {
    y = direct(term, cuda.linear, cuda.linear_scratch, inside, term.layer.out);
  } else {
    y = at::empty({x.size(0), term.layer.out}, inside.options());
    const int64_t rows = term.slice_rows(kSlice);
    const at::Tensor buffer = at::empty({rows, term.layer.in}, inside.options());
    for (int64_t r = 0; r < term.layer.out; r += rows) {
      const int64_t n = std::min(rows, term.layer.out - r);
      const at::Tensor slice = buffer.narrow(0, 0, n);
      term.decode(r, r + n, slice);
      at::Tensor part = y.narrow(1, r, n);
      at::mm_out(part, inside, slice.t());
    }
  }
  return through_frame(y, term.shape.out, term.shape.out, nullptr, row.out_block,
                       term.param(row.out_scale), result);
}

// Slices are of columns, so that each makes its part of dx whole; of tiles as wide as the matrix
// there is one slice.
at::Tensor term_grad_input(const DeviceTerm& term, const at::Tensor& grad, at::ScalarType result) {
  const Row& row = *term.row;
  const CudaRow& cuda = term.cuda;
  const LayerView& layer = term.layer;
  const bool straight = cuda.grad_input && grad.size(0) <= cuda.grad_input_max_m && !exact();
  const auto type = straight && cuda.takes_float ? at::kFloat : product_type(grad);
  const at::Tensor inside = through_frame(grad, term.shape.out, layer.out,
                                          term.param(row.out_scale), row.out_block, nullptr, type);
  at::Tensor dx;
  if (straight) {
    dx = direct(term, cuda.grad_input, cuda.grad_input_scratch, inside, layer.in);
  } else {
    dx = at::empty({grad.size(0), layer.in}, inside.options());
    const int64_t tiles =
        std::clamp<int64_t>(kSlice / (layer.out * layer.tile.cols), 1, layer.tile_cols());
    const int64_t columns = tiles * layer.tile.cols;
    const at::Tensor buffer = at::empty({layer.out * columns}, inside.options());
    for (int64_t c = 0; c < layer.in; c += columns) {
      const int64_t n = std::min(columns, layer.in - c);
      const at::Tensor slice = buffer.narrow(0, 0, layer.out * n).view({layer.out, n});
      const TileRange range{0, layer.tile_rows(), c / layer.tile.cols, (c + n) / layer.tile.cols};
      launch(grad, [&](cudaStream_t stream) {
        return cuda.decode(layer, range, slice.mutable_data_ptr(), n, type_of(slice), stream);
      });
      at::Tensor part = dx.narrow(1, c, n);
      at::mm_out(part, inside, slice);
    }
  }
  return through_frame(dx, term.shape.in, term.shape.in, nullptr, row.in_block,
                       term.param(row.in_scale), result);
}

// x (..., from) to (..., to) in its dtype: the sum of `product` over the terms, in float32 where
// there are several.
template <class Product>
at::Tensor sum_terms(const char* name, const at::Tensor& x, const DeviceTerms& all,
                     c10::string_view codec, int64_t from, int64_t to, Product&& product) {
  check_activation(name, x, from, codec);
  auto sizes = x.sizes().vec();
  sizes.back() = to;
  const at::Tensor rows = flat(x, from);
  if (!rows.numel() || !to) return at::zeros(sizes, x.options());
  const auto type = all.terms.size() == 1 ? x.scalar_type() : at::kFloat;
  at::Tensor sum;
  for (const DeviceTerm& term : all.terms) {
    const at::Tensor part = product(term, rows, type);
    sum = sum.defined() ? sum.add_(part) : part;
  }
  return sum.to(x.scalar_type()).view(sizes);
}

at::Tensor linear_op(const at::Tensor& x, const at::Tensor& codes, at::TensorList params,
                     c10::string_view codec, at::IntArrayRef shape) {
  check_place("x", x, codes, codec);
  const DeviceTerms all = bind_terms(codes, params, codec, shape);
  return sum_terms("x", x, all, codec, shape[1], shape[0], term_linear);
}

at::Tensor linear_grad_input_op(const at::Tensor& grad, const at::Tensor& codes,
                                at::TensorList params, c10::string_view codec,
                                at::IntArrayRef shape) {
  check_place("grad", grad, codes, codec);
  const DeviceTerms all = bind_terms(codes, params, codec, shape);
  return sum_terms("grad", grad, all, codec, shape[0], shape[1], term_grad_input);
}

at::Tensor hadamard_op(const at::Tensor& x, int64_t block) {
  check_hadamard(x, block);
  if (!x.numel() || block == 1) return x.clone(at::MemoryFormat::Contiguous);
  const int64_t n = x.size(-1);
  return through_frame(flat(x, n), n, n, nullptr, block, nullptr, x.scalar_type()).view(x.sizes());
}

}  // namespace
}  // namespace rs::cuda

RS_CUDA_IMPL(m) {
  m.impl("decode", rs::cuda::decode_op);
  m.impl("linear", rs::cuda::linear_op);
  m.impl("linear_grad_input", rs::cuda::linear_grad_input_op);
  m.impl("hadamard", rs::cuda::hadamard_op);
}
