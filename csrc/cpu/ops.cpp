#include "ops.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <numeric>

#include "../bind.h"
#include "../codecs/trellis.h"
#include "clones.h"
#include "frame.h"
#include "half.h"
#include "isa.h"
#include "parallel.h"
#include "viterbi.h"

namespace rs {
namespace {

std::atomic<bool> exact_panels{false};
std::atomic<Progress> progress_hook{nullptr};

// Rows of a block on which the frame closes: a multiple of the tile and of the Hadamard block.
int64_t block_rows(const Row& row) { return std::lcm(row.tile.rows, row.out_block); }

// Rows per panel: about `elements` weights, whole blocks.
int64_t panel_rows(const Row& row, const Layer& layer, int64_t elements) {
  const int64_t unit = block_rows(row);
  return std::max<int64_t>(1, elements / std::max<int64_t>(1, layer.in * unit)) * unit;
}

bool bf16_panels() { return !exact() && has_avx512_bf16(); }

// x as (rows, features), contiguous, in float32 or bfloat16.
at::Tensor flat(const at::Tensor& x, int64_t features) {
  const auto type = x.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
  return x.reshape({features ? x.numel() / features : 0, features}).to(type).contiguous();
}

Rows rows_of(const at::Tensor& x, int64_t first) {
  char* data = static_cast<char*>(x.data_ptr()) + first * x.size(1) * x.element_size();
  return {data, x.size(1), x.scalar_type() == at::kBFloat16};
}

// after * Hadamard(before * x) on the first n columns, `width` columns wide, in `type`.
at::Tensor through_frame(const at::Tensor& x, int64_t n, int64_t width, const float* before,
                         int64_t block, const float* after, at::ScalarType type) {
  const auto narrow = type == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
  if (!before && !after && block == 1 && x.size(1) == width && x.scalar_type() == narrow)
    return x.to(type);
  at::Tensor y = at::empty({x.size(0), width}, narrow);
  parallel_for(x.size(0), 1, [&](int64_t begin, int64_t end) {
    frame_rows(rows_of(x, begin), rows_of(y, begin), end - begin, n, width, before, block, after);
  });
  return y.to(type);
}

// Both Hadamard transforms on whole blocks of rows, `width` apart, of which the first n columns
// count.
void rotate(const Row& row, float* x, int64_t rows, int64_t width, int64_t n) {
  if (row.in_block > 1)
    for (int64_t i = 0; i < rows; ++i) hadamard_rows(x + i * width, 1, n, row.in_block);
  hadamard_columns(x, rows, width, row.out_block);
}

const float* param(const Layer& layer, int index) {
  return index < 0 ? nullptr : layer.params[index];
}

// Weights decoded at a time where they are used at once: 128 KB, in the second-level cache.
constexpr int64_t kChunk = int64_t{1} << 15;

RS_CLONES void narrow(const float* x, int64_t n, uint16_t* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = to_bf16(x[i]);
}

// Rows [row0, row1) of T rounded to bfloat16, by way of float32 where the codec has no other.
void decode_narrow(const Row& row, const Layer& layer, int64_t row0, int64_t row1, uint16_t* w) {
  if (row.decode_bf16) return row.decode_bf16(layer, row0, row1, w);
  const int64_t step = std::max<int64_t>(1, kChunk / (row.tile.rows * layer.in)) * row.tile.rows;
  std::vector<float> wide(static_cast<size_t>(std::min(step, row1 - row0) * layer.in));
  for (int64_t r = row0; r < row1; r += step) {
    const int64_t end = std::min(r + step, row1);
    row.decode(layer, r, end, wide.data());
    narrow(wide.data(), (end - r) * layer.in, w + (r - row0) * layer.in);
  }
}

// Rows [row0, row1) of T as a panel of float32 or bfloat16.
void fill_panel(const Row& row, const Layer& layer, int64_t row0, int64_t row1, at::Tensor& panel) {
  const bool half = panel.scalar_type() == at::kBFloat16;
  parallel_for((row1 - row0) / row.tile.rows, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = row0 + begin * row.tile.rows, last = row0 + end * row.tile.rows;
    const int64_t at = (first - row0) * layer.in;
    if (!half) return row.decode(layer, first, last, panel.data_ptr<float>() + at);
    auto* out = reinterpret_cast<uint16_t*>(panel.data_ptr<at::BFloat16>()) + at;
    decode_narrow(row, layer, first, last, out);
  });
}

struct Panels {
  const Row& row;
  const Layer& layer;
  int64_t rows;
  at::Tensor buffer;

  Panels(const Row& row, const Layer& layer, int64_t elements, at::ScalarType type)
      : row(row), layer(layer), rows(std::min(panel_rows(row, layer, elements), layer.out)) {
    // Kept by the thread: fresh pages for every call cost as much as decoding into them.
    thread_local at::Tensor kept[2];
    at::Tensor& pages = kept[type == at::kFloat];
    if (!pages.defined() || pages.numel() < rows * layer.in)
      pages = at::empty({rows * layer.in}, type);
    buffer = pages.narrow(0, 0, rows * layer.in).view({rows, layer.in});
  }
  template <class Visit>
  void each(Visit&& visit) {
    for (int64_t r = 0; r < layer.out; r += rows) {
      const int64_t n = std::min(rows, layer.out - r);
      at::Tensor panel = buffer.narrow(0, 0, n);
      fill_panel(row, layer, r, r + n, panel);
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

at::ScalarType panel_type() { return bf16_panels() ? at::kBFloat16 : at::kFloat; }

// Batches up to this are multiplied row by row as rows are decoded; larger ones panel by panel.
constexpr int64_t kRowProduct = 8;

RS_CLONES float dot(const float* a, const float* b, int64_t n) {
  constexpr int64_t kLanes = 64;  // partial sums in a fixed order, whatever the vector width
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += a[i + lane] * b[i + lane];
  for (; i < n; ++i) lanes[i % kLanes] += a[i] * b[i];
  for (int64_t half = kLanes / 2; half; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

// y[m * out] = x[m * in] @ T^T in float32. Rows are decoded a few at a time: they stay in the
// second-level cache, and a codec builds its tables once for all of them.
void row_product(const Row& row, const Layer& layer, const float* x, int64_t m, float* y) {
  const int64_t in = layer.in, chunk = panel_rows(row, layer, kChunk);
  parallel_for(layer.out, chunk, [&](int64_t begin, int64_t end) {
    std::vector<float> w(static_cast<size_t>(chunk * in));
    for (int64_t r = begin; r < end; r += chunk) {
      const int64_t rows = std::min(chunk, end - r);
      row.decode(layer, r, r + rows, w.data());
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t b = 0; b < m; ++b)
          y[b * layer.out + r + i] = dot(w.data() + i * in, x + b * in, in);
    }
  });
}

// Exact accuracy takes the slots' own products only when they are made in float32.
bool may_compute_so(const Row& row) {
  return !exact() || std::string_view(row.linear_type) == "float32";
}

at::Tensor term_linear(const Row& row, const Layer& layer, Shape shape, const at::Tensor& x,
                       at::ScalarType result) {
  const int64_t m = x.size(0);
  const bool direct = row.linear && m <= row.linear_max_m && may_compute_so(row);
  const bool by_row = !direct && m <= kRowProduct;
  const auto type = direct || by_row ? at::kFloat : panel_type();
  const at::Tensor inside =
      through_frame(x, shape.in, layer.in, param(layer, row.in_scale), row.in_block, nullptr, type);
  at::Tensor y = at::empty({m, layer.out}, type);
  if (direct) {
    row.linear(layer, inside.data_ptr<float>(), m, y.data_ptr<float>());
  } else if (by_row) {
    row_product(row, layer, inside.data_ptr<float>(), m, y.data_ptr<float>());
  } else {
    Panels panels(row, layer, product_panel(m), type);
    panels.each([&](int64_t r, int64_t n, const at::Tensor& panel) {
      y.narrow(1, r, n).copy_(at::mm(inside, panel.t()));
    });
  }
  return through_frame(y, shape.out, shape.out, nullptr, row.out_block, param(layer, row.out_scale),
                       result);
}

at::Tensor term_grad_input(const Row& row, const Layer& layer, Shape shape, const at::Tensor& grad,
                           at::ScalarType result) {
  const bool direct = row.linear_grad_input && may_compute_so(row);
  const auto type = direct ? at::kFloat : panel_type();
  const at::Tensor inside = through_frame(grad, shape.out, layer.out, param(layer, row.out_scale),
                                          row.out_block, nullptr, type);
  if (direct) {
    const at::Tensor dx = at::empty({grad.size(0), layer.in});
    row.linear_grad_input(layer, inside.data_ptr<float>(), grad.size(0), dx.data_ptr<float>());
    return through_frame(dx, shape.in, shape.in, nullptr, row.in_block, param(layer, row.in_scale),
                         result);
  }
  Panels panels(row, layer, input_gradient_panel(grad.size(0)), type);
  at::Tensor dx = at::empty({grad.size(0), layer.in});
  at::Tensor part = at::empty({grad.size(0), layer.in}, type);
  panels.each([&](int64_t r, int64_t n, const at::Tensor& panel) {
    at::mm_out(part, inside.narrow(1, r, n), panel);
    if (r)
      dx.add_(part);
    else
      dx.copy_(part);
  });
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

void set_exact(bool exact) { exact_panels = exact; }
bool exact() { return exact_panels; }
void set_progress_hook(Progress hook) { progress_hook = hook; }

void parallel_for_raw(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t),
                      void* context) {
  const int64_t chunks = (n + grain - 1) / grain;
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    if (begin < end) body(context, begin * grain, std::min(n, end * grain));
  });
}

at::Tensor decode(const at::Tensor& codes, at::TensorList params, c10::string_view codec,
                  at::IntArrayRef shape) {
  const Bound bound = bind_layers(codes, params, codec, shape);
  at::Tensor w = at::zeros(shape);
  if (!w.numel()) return w;
  for (size_t t = 0; t < bound.layers.size(); ++t) {
    const Row& row = (*bound.terms)[t].row;
    const Layer& layer = bound.layers[t];
    const int64_t unit = block_rows(row), in = bound.shape.in;
    parallel_for(layer.out, unit, [&](int64_t begin, int64_t end) {
      std::vector<float> block(static_cast<size_t>(unit * layer.in));
      for (int64_t r = begin; r < end; r += unit) {
        const int64_t rows = std::min(unit, end - r);
        row.decode(layer, r, r + rows, block.data());
        rotate(row, block.data(), rows, layer.in, in);
        const float *out_scale = param(layer, row.out_scale),
                    *in_scale = param(layer, row.in_scale);
        float* w_rows = w.data_ptr<float>() + r * in;
        for (int64_t i = 0; i < std::min(rows, bound.shape.out - r); ++i)
          for (int64_t j = 0; j < in; ++j) {
            float value = block[i * layer.in + j];
            if (out_scale) value = value * out_scale[r + i];
            if (in_scale) value = value * in_scale[j];
            w_rows[i * in + j] = t ? w_rows[i * in + j] + value : value;
          }
      }
    });
  }
  return w;
}

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

namespace {

// Work in chunks of about a tenth of a second, so that a signal is seen within one.
template <class Body>
void in_chunks(int64_t total, int64_t batch, Body&& body) {
  using Clock = std::chrono::steady_clock;
  int64_t chunk = batch * at::get_num_threads();
  for (int64_t done = 0; done < total;) {
    const int64_t end = std::min(total, done + chunk);
    const auto start = Clock::now();
    parallel_for(end - done, batch, [&](int64_t a, int64_t b) { body(done + a, done + b); });
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    done = end;
    if (seconds < 0.05) chunk *= 2;
    if (seconds > 0.2) chunk = std::max(batch * at::get_num_threads(), chunk / 2);
    if (Progress hook = progress_hook) hook(done, total);
  }
}

}  // namespace

std::tuple<at::Tensor, Tensors> encode(const at::Tensor& weight,
                                       const std::optional<at::Tensor>& importance,
                                       at::TensorList params, c10::string_view codec) {
  Encoding encoding = begin_encoding(weight, importance, params, codec);
  const Row& row = encoding.row();
  if (!encoding.codes.numel()) return {encoding.codes, encoding.params};
  const Bound bound = bind_layers(encoding.codes, encoding.params, codec, weight.sizes());
  const Layer& layer = bound.layers[0];
  EncodeOptions options;
  if (encoding.importance.defined()) options.importance = encoding.importance.data_ptr<float>();

  const at::Tensor target = without_scales(weight, encoding);
  parallel_for(weight.size(0), row.out_block, [&](int64_t begin, int64_t end) {
    rotate(row, target.data_ptr<float>() + begin * layer.in, end - begin, layer.in, weight.size(1));
  });

  std::vector<float*> outputs;
  for (at::Tensor& p : encoding.params) outputs.push_back(static_cast<float*>(p.data_ptr()));
  in_chunks(layer.tile_rows() * layer.tile_cols(), row.encode_batch,
            [&](int64_t tile0, int64_t tile1) {
              row.encode(layer, target.data_ptr<float>(), options, tile0, tile1,
                         encoding.codes.data_ptr<uint8_t>(), outputs.data());
            });
  return {encoding.codes, encoding.params};
}

at::Tensor hadamard(const at::Tensor& x, int64_t block) {
  check_hadamard(x, block);
  if (!x.numel() || block == 1) return x.clone(at::MemoryFormat::Contiguous);
  const int64_t n = x.size(-1);
  return through_frame(flat(x, n), n, n, nullptr, block, nullptr, x.scalar_type()).view(x.sizes());
}

at::Tensor trellis_encode(const at::Tensor& targets, const at::Tensor& radius,
                          const at::Tensor& angle, double bits, c10::string_view search) {
  const int k = check_trellis_encode(targets, radius, angle, bits, search);
  const at::Tensor in = targets.contiguous(), radii = radius.contiguous(),
                   angles = angle.contiguous();
  at::Tensor codes = at::zeros({in.size(0), 16 * k}, at::kByte);
  const auto viterbi = trellis_search(k, radii.data_ptr<float>(), angles.data_ptr<float>(),
                                      search == "fast" ? Search::fast : Search::exact);
  in_chunks(in.size(0), TrellisSearch::kBatch, [&](int64_t begin, int64_t end) {
    viterbi->run(in.data_ptr<float>() + begin * 256, end - begin,
                 codes.data_ptr<uint8_t>() + begin * codes.size(1));
  });
  return codes;
}

void check_codes(const at::Tensor& codes, at::TensorList params, c10::string_view codec,
                 at::IntArrayRef shape) {
  const Bound bound = bind_layers(codes, params, codec, shape);
  for (size_t t = 0; t < bound.layers.size(); ++t) {
    const Row& row = (*bound.terms)[t].row;
    const Layer& layer = bound.layers[t];
    if (!row.check) continue;
    for (int64_t tile = 0; tile < layer.tile_rows() * layer.tile_cols(); ++tile) {
      try {
        row.check(layer, tile);
      } catch (const std::invalid_argument& error) {
        TORCH_CHECK_VALUE(false, codec, ": ", (*bound.terms)[t].prefix, "codes tile (",
                          tile / layer.tile_cols(), ", ", tile % layer.tile_cols(),
                          ") is no valid code: ", error.what());
      }
    }
  }
  for (size_t i = 0; i < params.size(); ++i)
    if (params[i].is_floating_point())
      TORCH_CHECK_VALUE(params[i].isfinite().all().item<bool>(), codec, ": param ", i,
                        " holds a value that is not finite");
}

}  // namespace rs
