// The gradients of params: dLoss/dW block by block, through the frame, to the adjoint slots.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "../bind.h"
#include "fast.h"
#include "frame.h"
#include "ops.h"
#include "pairs.h"
#include "parallel.h"
#include "terms.h"
#include "widths.h"

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
  float* of(int param) const { return param < 0 ? nullptr : pointers[static_cast<size_t>(param)]; }
  int64_t size() const {
    int64_t floats = 0;
    for (const std::vector<float>& one : own) floats += static_cast<int64_t>(one.size());
    return floats;
  }
  void add_to(Tensors& grads) const {
    for (size_t i = 0; i < own.size(); ++i)
      for (size_t j = 0; j < own[i].size(); ++j) grads[i].data_ptr<float>()[j] += own[i][j];
  }
};

constexpr int kLanes = 16;  // partial sums in a fixed order on any machine

template <int L>
using Sixteen = Wide<float, kLanes, L>;

// `count` values; the other lanes are zero.
template <int L>
RS_INLINE void load(const float* x, int64_t count, Sixteen<L>& v) {
  if (count == kLanes) return v.load(x);
  v = {};
  std::memcpy(&v, x, static_cast<size_t>(count) * sizeof(float));
}
template <int L>
RS_INLINE void store(const Sixteen<L>& v, int64_t count, float* x) {
  if (count == kLanes) return v.store(x);
  std::memcpy(x, &v, static_cast<size_t>(count) * sizeof(float));
}

// `count` values of one row of W = so * p * si: adds dLoss/dsi, turns d from dLoss/dW into
// dLoss/dp, adds to the lanes of dLoss/dso.
template <int L>
RS_INLINE void scale_lanes(const float* p, float* d, int64_t count, float so, const float* si,
                           float* dsi, Sixteen<L>& sum) {
  Sixteen<L> dp, product;
  load<L>(d, count, dp);
  load<L>(p, count, product);
  product *= dp;
  if (si) {
    Sixteen<L> scale, dscale;
    load<L>(si, count, scale);
    load<L>(dsi, count, dscale);
    dscale.add(product, so);
    store<L>(dscale, count, dsi);
    product *= scale;
    dp *= scale;
  }
  sum += product;
  dp *= so;
  store<L>(dp, count, d);
}

// Null scales are ones and have no gradients.
template <int L>
RS_INLINE void scale_gradients(const float* p, int64_t p_apart, float* d, int64_t d_apart,
                               int64_t rows, int64_t n, const float* so, float* dso,
                               const float* si, float* dsi) {
  for (int64_t i = 0; i < rows; ++i, p += p_apart, d += d_apart) {
    const float scale = so ? so[i] : 1.0f;
    Sixteen<L> sum = {};
    int64_t j = 0;
    if (si)
      for (; j + kLanes <= n; j += kLanes)
        scale_lanes<L>(p + j, d + j, kLanes, scale, si + j, dsi + j, sum);
    else
      for (; j + kLanes <= n; j += kLanes)
        scale_lanes<L>(p + j, d + j, kLanes, scale, nullptr, nullptr, sum);
    if (j < n)
      scale_lanes<L>(p + j, d + j, n - j, scale, si ? si + j : si, si ? dsi + j : dsi, sum);
    if (so) dso[i] += sum_lanes(sum.v);
  }
}
void scale_gradients(const float* p, int64_t p_apart, float* d, int64_t d_apart, int64_t rows,
                     int64_t n, const float* so, float* dso, const float* si, float* dsi) {
  by_width([&]<int L>() RS_LAMBDA {
    scale_gradients<L>(p, p_apart, d, d_apart, rows, n, so, dso, si, dsi);
  });
}

// Rows at a time: in the second-level cache; sums of shared gradients, so that they stay few, and
// the floats of those at a time.
constexpr int64_t kPieceRows = 32, kPieceUnit = 8, kBlockRows = 128, kPrivate = int64_t{1} << 22;

// Columns of dLoss/dW that are made at once, and how far apart rows of them lie.
constexpr int64_t kStrip = 4 * kSquare, kStripApart = kStrip + 16;

// What a thread works in: T and dLoss/dT of some rows, and a square of each.
struct Workspace {
  std::vector<float> t, dw, squares;

  Workspace(const Row& row, int64_t rows, int64_t in)
      : t(static_cast<size_t>(scaled(row) ? rows * in : 0)),
        dw(static_cast<size_t>(rows * in)),
        squares(static_cast<size_t>(turned(row) ? rows * (kSquareApart + kStripApart) : 0)) {}

  static bool scaled(const Row& row) { return row.out_scale >= 0 || row.in_scale >= 0; }
  static bool turned(const Row& row) { return row.out_block > 1 || row.in_block > 1; }
};

template <class T>
T* from(T* values, int64_t first) {
  return values ? values + first : nullptr;
}

// Part of a row-major dLoss/dW that is to be written.
struct Rectangle {
  int64_t row, col, rows, cols;
  float* at;
  int64_t stride;

  at::Tensor tensor() const { return at::from_blob(at, {rows, cols}, {stride, 1}, at::kFloat); }
};

// dW of some rows in the outer basis, of which `fill` writes rectangles -> gradients of the frame's
// scales, then of T's params.
//   W = out_scale * P * in_scale with P = H_out T H_in
template <class Fill>
void block_grad_params(const Row& row, const Layer& layer, Shape shape, int64_t r, int64_t rows,
                       Fill&& fill, Workspace& work, const BlockGrads& grads) {
  const int64_t in = layer.in, real = std::min(rows, shape.out - r);
  const float *out_scale = param(layer, row.out_scale), *in_scale = param(layer, row.in_scale);
  float *dout_scale = grads.of(row.out_scale), *din_scale = grads.of(row.in_scale);
  const bool scaled = Workspace::scaled(row), turned = Workspace::turned(row);
  if (scaled) row.decode(layer, r, r + rows, work.t.data());
  float* t = turned ? work.squares.data() : work.t.data();
  float* strip = turned ? work.squares.data() + rows * kSquareApart : work.dw.data();
  const int64_t wide = turned ? kStrip : shape.in, apart = turned ? kStripApart : in;
  const int64_t side = turned ? kSquare : shape.in, t_apart = turned ? kSquareApart : in;
  std::fill(strip + real * apart, strip + rows * apart, 0.0f);
  for (int64_t first = 0; first < shape.in; first += wide) {
    const int64_t last = std::min(first + wide, shape.in);
    fill(Rectangle{r, first, real, last - first, strip, apart});
    for (int64_t c = first; c < last; c += side) {
      const int64_t cols = std::min(side, last - c);
      float* dw = strip + (c - first);
      if (scaled && turned) {
        hadamard_rows(work.t.data() + c, in, t, t_apart, rows, cols, row.in_block);
        hadamard_columns(t, rows, cols, t_apart, row.out_block);
      }
      if (scaled)
        scale_gradients(t, t_apart, dw, apart, real, cols, from(out_scale, r), from(dout_scale, r),
                        from(in_scale, c), from(din_scale, c));
      if (!turned) continue;
      hadamard_columns(dw, rows, cols, apart, row.out_block);
      hadamard_rows(dw, apart, work.dw.data() + c, in, rows, cols, row.in_block);
    }
  }
  row.adjoint(layer, r, r + rows, work.dw.data(), grads.pointers.data());
}

// Gradients of all params given dLoss/dW, of which `fill` writes a Rectangle.
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
    // Shared gradients are summed by blocks of rows, the work is done by pieces of them.
    const int64_t piece = round_up(kPieceRows, std::lcm(block_rows(row), kPieceUnit));
    const int64_t block = round_up(kBlockRows, piece), blocks = (layer.out + block - 1) / block;
    const int64_t step = std::max<int64_t>(8, kPrivate / (BlockGrads(row, grads).size() + 1));
    for (int64_t first = 0; first < blocks; first += step) {
      std::vector<BlockGrads> partial;
      for (int64_t b = first; b < std::min(blocks, first + step); ++b)
        partial.emplace_back(row, grads);
      parallel_for(static_cast<int64_t>(partial.size()), 1, [&](int64_t begin, int64_t end) {
        Workspace work(row, std::min(piece, layer.out), layer.in);
        for (int64_t b = begin; b < end; ++b) {
          const int64_t row0 = (first + b) * block, row1 = std::min(row0 + block, layer.out);
          for (int64_t r = row0; r < row1; r += piece)
            block_grad_params(row, layer, bound.shape, r, std::min(piece, row1 - r), fill, work,
                              partial[static_cast<size_t>(b)]);
        }
      });
      for (const BlockGrads& p : partial) p.add_to(grads);
    }
  }
  return all;
}

#if RS_FAST_X86
PairedBatch paired(const at::Tensor& rows, int64_t width) {
  const at::Tensor x = rows.to(at::kBFloat16);
  return PairedBatch(reinterpret_cast<const uint16_t*>(x.data_ptr<at::BFloat16>()), x.size(0),
                     x.size(1), width);
}
#endif

}  // namespace

Tensors linear_grad_params(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& codes,
                           at::TensorList params, c10::string_view codec, at::IntArrayRef sizes) {
  const Bound bound = bind_layers(codes, params, codec, sizes);
  const auto [out, in] = bound.shape;
  check_batches(grad, x, out, in, codec);
  at::Tensor x_rows = flat(x, in), g_rows = flat(grad, out);
#if RS_FAST_X86
  if (bf16_panels()) {
    const PairedBatch right = paired(x_rows, kPairCols), left = paired(g_rows, kPairRows);
    const int64_t pairs = left.pairs;
    return grad_params(bound, params, [&](const Rectangle& w) {
      pair_product({left.column(w.row), kPairRows * pairs, 1, kPairRows}, right.column(w.col),
                   kPairCols * pairs, pairs, w.rows, w.cols, w.at, w.stride, false);
    });
  }
#endif
  x_rows = x_rows.to(at::kFloat), g_rows = g_rows.to(at::kFloat);
  return grad_params(bound, params, [&](const Rectangle& w) {
    const at::AutoDispatchBelowAutograd threads_have_none;
    at::Tensor dw = w.tensor();
    at::mm_out(dw, g_rows.narrow(1, w.row, w.rows).t(), x_rows.narrow(1, w.col, w.cols));
  });
}

Tensors decode_grad_params(const at::Tensor& grad, const at::Tensor& codes, at::TensorList params,
                           c10::string_view codec, at::IntArrayRef sizes) {
  const Bound bound = bind_layers(codes, params, codec, sizes);
  check_weight_gradient(grad, sizes, codec);
  return grad_params(bound, params, [&](const Rectangle& w) {
    const at::AutoDispatchBelowAutograd threads_have_none;
    w.tensor().copy_(grad.narrow(0, w.row, w.rows).narrow(1, w.col, w.cols));
  });
}

}  // namespace rs
