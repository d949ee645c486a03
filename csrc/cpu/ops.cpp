#include "ops.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "../bind.h"
#include "clones.h"
#include "panels.h"
#include "parallel.h"
#include "terms.h"

namespace rs {
namespace {

std::atomic<Accuracy> accuracy_mode{Accuracy::automatic};

}  // namespace

void set_accuracy(Accuracy mode) { accuracy_mode = mode; }
Accuracy accuracy() { return accuracy_mode; }

void parallel_for_raw(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t),
                      void* context) {
  const int64_t chunks = (n + grain - 1) / grain;
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    if (begin < end) body(context, begin * grain, std::min(n, end * grain));
  });
}

namespace {

constexpr int64_t kChunk = int64_t{1} << 15;  // weights, 128 KB in the second-level cache

// A row of a term after its rotation, added to the terms before it.
RS_CLONES void put_row(const float* __restrict values, int64_t n, float out_scale,
                       const float* __restrict in_scale, bool add, float* __restrict w) {
  for (int64_t j = 0; j < n; ++j) {
    float value = values[j] * out_scale;
    if (in_scale) value = value * in_scale[j];
    w[j] = add ? w[j] + value : value;
  }
}

}  // namespace

at::Tensor decode(const at::Tensor& codes, at::TensorList params, c10::string_view codec,
                  at::IntArrayRef shape) {
  const Bound bound = bind_layers(codes, params, codec, shape);
  at::Tensor w = at::empty(shape);
  if (!w.numel()) return w;
  for (size_t t = 0; t < bound.layers.size(); ++t) {
    const Row& row = (*bound.terms)[t].row;
    const Layer& layer = bound.layers[t];
    const int64_t in = bound.shape.in, chunk = rows_of(kChunk, block_rows(row), layer);
    const float *out_scale = param(layer, row.out_scale), *in_scale = param(layer, row.in_scale);
    parallel_for(layer.out, chunk, [&](int64_t begin, int64_t end) {
      std::vector<float> block(static_cast<size_t>(std::min(chunk, end - begin) * layer.in));
      for (int64_t r = begin; r < end; r += chunk) {
        const int64_t rows = std::min(chunk, end - r);
        row.decode(layer, r, r + rows, block.data());
        rotate(row, block.data(), rows, layer.in, in);
        float* w_rows = w.data_ptr<float>() + r * in;
        for (int64_t i = 0; i < std::min(rows, bound.shape.out - r); ++i)
          put_row(block.data() + i * layer.in, in, out_scale ? out_scale[r + i] : 1.0f, in_scale,
                  t > 0, w_rows + i * in);
      }
    });
  }
  return w;
}

at::Tensor hadamard(const at::Tensor& x, int64_t block) {
  check_hadamard(x, block);
  if (!x.numel() || block == 1) return x.clone(at::MemoryFormat::Contiguous);
  const int64_t n = x.size(-1);
  return through_frame(flat(x, n), n, n, nullptr, block, nullptr, x.scalar_type()).view(x.sizes());
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
