// The product and the gradient to its input: by a codec's own slots, row by row, or in panels.
#include <algorithm>

#include "../bind.h"
#include "dots.h"
#include "fast.h"
#include "ops.h"
#include "panels.h"
#include "parallel.h"
#include "terms.h"

namespace rs {
namespace {

// Weights decoded at a time where they are used at once: 128 KB, in the second-level cache.
constexpr int64_t kChunk = int64_t{1} << 15;

// Rows [row0, row1) of T.
void fill_panel(const Row& row, const Layer& layer, int64_t row0, int64_t row1, float* panel) {
  parallel_for((row1 - row0) / row.tile.rows, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * row.tile.rows, last = end * row.tile.rows;
    row.decode(layer, row0 + first, row0 + last, panel + first * layer.in);
  });
}

struct Panels {
  const Row& row;
  const Layer& layer;
  int64_t rows;
  at::Tensor buffer;

  Panels(const Row& row, const Layer& layer, int64_t elements)
      : row(row), layer(layer), rows(std::min(rows_of(elements, row.tile.rows, layer), layer.out)) {
    // Kept by the thread: fresh pages for every call cost as much as decoding into them.
    thread_local at::Tensor pages;
    if (!pages.defined() || pages.numel() < rows * layer.in) pages = at::empty({rows * layer.in});
    buffer = pages.narrow(0, 0, rows * layer.in).view({rows, layer.in});
  }
  template <class Visit>
  void each(Visit&& visit) {
    for (int64_t r = 0; r < layer.out; r += rows) {
      const int64_t n = std::min(rows, layer.out - r);
      at::Tensor panel = buffer.narrow(0, 0, n);
      fill_panel(row, layer, r, r + n, panel.data_ptr<float>());
      visit(r, n, panel);
    }
  }
};

// Weights per panel. A product's panels stay in the second-level cache. The gradient to the input
// is a sum over panels, so there larger ones save passes over the sum (16 MB of bfloat16).
int64_t product_panel(int64_t batch) { return batch < 64 ? int64_t{1} << 20 : int64_t{1} << 21; }
int64_t input_gradient_panel(int64_t batch) {
  return batch < 256 ? int64_t{1} << 21 : int64_t{1} << 23;
}

// Batches up to this are multiplied row by row as rows are decoded; larger ones panel by panel.
constexpr int64_t kRowProduct = 8;

// y[m * out] = x[m * in] @ T^T in float32. Rows are decoded a few at a time: they stay in the
// second-level cache, and a codec builds its tables once for all of them.
void row_product(const Row& row, const Layer& layer, const float* x, int64_t m, float* y) {
  const int64_t in = layer.in, chunk = rows_of(kChunk, row.tile.rows, layer);
  parallel_for(layer.out, chunk, [&](int64_t begin, int64_t end) {
    std::vector<float> w(static_cast<size_t>(chunk * in));
    for (int64_t r = begin; r < end; r += chunk) {
      const int64_t rows = std::min(chunk, end - r);
      row.decode(layer, r, r + rows, w.data());
      dots(w.data(), rows, x, m, in, y + r, layer.out);
    }
  });
}

// dx[m * in] = dy[m * out] @ T the same way. Each of kParts runs of rows, whatever the number of
// threads, has sums of its own.
void row_grad_input(const Row& row, const Layer& layer, const float* dy, int64_t m, float* dx) {
  constexpr int64_t kParts = 16;
  const int64_t in = layer.in, chunk = rows_of(kChunk, row.tile.rows, layer);
  const int64_t part = round_up((layer.out + kParts - 1) / kParts, chunk);
  const int64_t parts = (layer.out + part - 1) / part;
  std::vector<float> sums(static_cast<size_t>((parts - 1) * m * in));
  std::fill_n(dx, m * in, 0.0f);
  parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> w(static_cast<size_t>(chunk * in));
    for (int64_t p = begin; p < end; ++p) {
      float* to = p ? sums.data() + (p - 1) * m * in : dx;
      const int64_t last = std::min((p + 1) * part, layer.out);
      for (int64_t r = p * part; r < last; r += chunk) {
        const int64_t rows = std::min(chunk, last - r);
        row.decode(layer, r, r + rows, w.data());
        add_rows(w.data(), rows, dy + r, m, layer.out, in, to);
      }
    }
  });
  for (int64_t p = 0; p + 1 < parts; ++p)
    for (int64_t i = 0; i < m * in; ++i) dx[i] += sums[static_cast<size_t>(p * m * in + i)];
}

// Exact accuracy takes the slots' own products only when they are made in float32.
bool may_compute_so(const Row& row) {
  return !exact() || std::string_view(row.linear_type) == "float32";
}

#if RS_FAST_X86
const uint16_t* bits(const at::Tensor& x) {
  return reinterpret_cast<const uint16_t*>(x.data_ptr<at::BFloat16>());
}
#endif

at::Tensor term_linear(const Row& row, const Layer& layer, Shape shape, const at::Tensor& x,
                       at::ScalarType result) {
  const int64_t m = x.size(0);
  const bool direct = row.linear && m <= row.linear_max_m && may_compute_so(row);
  const bool by_row = !direct && m <= kRowProduct;
  const bool narrow = !direct && !by_row && bf16_panels() && layer.in % 2 == 0;
  const at::Tensor inside =
      through_frame(x, shape.in, layer.in, param(layer, row.in_scale), row.in_block, nullptr,
                    narrow ? at::kBFloat16 : at::kFloat);
  at::Tensor y = at::empty({m, layer.out});
  if (direct) {
    const bool bytes = accuracy() == Accuracy::int8 && row.linear_int8;
    (bytes ? row.linear_int8 : row.linear)(layer, inside.data_ptr<float>(), m, y.data_ptr<float>());
  } else if (by_row) {
    row_product(row, layer, inside.data_ptr<float>(), m, y.data_ptr<float>());
#if RS_FAST_X86
  } else if (narrow) {
    panel_linear(row, layer, bits(inside), m, y.data_ptr<float>());
#endif
  } else {
    Panels panels(row, layer, product_panel(m));
    panels.each([&](int64_t r, int64_t n, const at::Tensor& panel) {
      at::Tensor part = y.narrow(1, r, n);
      at::mm_out(part, inside, panel.t());
    });
  }
  return through_frame(y, shape.out, shape.out, nullptr, row.out_block, param(layer, row.out_scale),
                       result);
}

at::Tensor term_grad_input(const Row& row, const Layer& layer, Shape shape, const at::Tensor& grad,
                           at::ScalarType result) {
  const int64_t m = grad.size(0);
  const bool direct = row.linear_grad_input && may_compute_so(row);
  const bool by_row = !direct && m <= kRowProduct;
  const bool narrow = !direct && !by_row && bf16_panels();
  const int64_t width = narrow ? round_up(layer.out, 2) : layer.out;
  const at::Tensor inside =
      through_frame(grad, shape.out, width, param(layer, row.out_scale), row.out_block, nullptr,
                    narrow ? at::kBFloat16 : at::kFloat);
  at::Tensor dx = at::empty({m, layer.in});
  if (direct) {
    row.linear_grad_input(layer, inside.data_ptr<float>(), m, dx.data_ptr<float>());
  } else if (by_row) {
    row_grad_input(row, layer, inside.data_ptr<float>(), m, dx.data_ptr<float>());
#if RS_FAST_X86
  } else if (narrow) {
    panel_grad_input(row, layer, bits(inside), m, width, dx.data_ptr<float>());
#endif
  } else {
    Panels panels(row, layer, input_gradient_panel(m));
    panels.each([&](int64_t r, int64_t n, const at::Tensor& panel) {
      if (r)
        dx.addmm_(inside.narrow(1, r, n), panel);
      else
        at::mm_out(dx, inside.narrow(1, r, n), panel);
    });
  }
  return through_frame(dx, shape.in, shape.in, nullptr, row.in_block, param(layer, row.in_scale),
                       result);
}

// Checks x (..., from) and gives (..., to) in its dtype: the sum of `product` over the terms, in
// float32 where there are several.
template <class Product>
at::Tensor sum_terms(const char* name, const at::Tensor& x, const Bound& bound,
                     c10::string_view codec, int64_t from, int64_t to, Product&& product) {
  check_activation(name, x, from, codec);
  auto sizes = x.sizes().vec();
  sizes.back() = to;
  const at::Tensor rows = flat(x, from);
  if (!rows.numel() || !to) return at::zeros(sizes, x.options());
  const auto type = bound.layers.size() == 1 ? x.scalar_type() : at::kFloat;
  at::Tensor sum;
  for (size_t t = 0; t < bound.layers.size(); ++t) {
    const at::Tensor term =
        product((*bound.terms)[t].row, bound.layers[t], bound.shape, rows, type);
    sum = sum.defined() ? sum + term : term;
  }
  return sum.to(x.scalar_type()).view(sizes);
}

}  // namespace

at::Tensor linear(const at::Tensor& x, const at::Tensor& codes, at::TensorList params,
                  c10::string_view codec, at::IntArrayRef shape) {
  const Bound bound = bind_layers(codes, params, codec, shape);
  return sum_terms("x", x, bound, codec, bound.shape.in, bound.shape.out, term_linear);
}

at::Tensor linear_grad_input(const at::Tensor& grad, const at::Tensor& codes, at::TensorList params,
                             c10::string_view codec, at::IntArrayRef shape) {
  const Bound bound = bind_layers(codes, params, codec, shape);
  return sum_terms("grad", grad, bound, codec, bound.shape.out, bound.shape.in, term_grad_input);
}

}  // namespace rs
