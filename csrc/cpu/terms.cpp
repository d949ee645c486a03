#include "terms.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "frame.h"
#include "isa.h"
#include "ops.h"
#include "parallel.h"

namespace rs {

int64_t block_rows(const Row& row) { return std::lcm(row.tile.rows, row.out_block); }

bool bf16_panels() { return !exact() && has_avx512_bf16(); }

at::Tensor flat(const at::Tensor& x, int64_t features) {
  const auto type = x.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
  return x.reshape({features ? x.numel() / features : 0, features}).to(type).contiguous();
}

namespace {

Rows rows_of(const at::Tensor& x, int64_t first) {
  char* data = static_cast<char*>(x.data_ptr()) + first * x.size(1) * x.element_size();
  return {data, x.size(1), x.scalar_type() == at::kBFloat16};
}

}  // namespace

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

void rotate(const Row& row, float* x, int64_t rows, int64_t width, int64_t n) {
  if (row.out_block == 1) return hadamard_rows(x, width, x, width, rows, n, row.in_block);
  std::vector<float> square(static_cast<size_t>(row.out_block * kSquareApart));
  for (int64_t r = 0; r < rows; r += row.out_block, x += row.out_block * width)
    for (int64_t c = 0; c < n; c += kSquare) {
      const int64_t cols = std::min(kSquare, n - c);
      hadamard_rows(x + c, width, square.data(), kSquareApart, row.out_block, cols, row.in_block);
      hadamard_columns(square.data(), row.out_block, cols, kSquareApart, row.out_block);
      for (int64_t i = 0; i < row.out_block; ++i)
        std::copy_n(square.data() + i * kSquareApart, cols, x + i * width + c);
    }
}

const float* param(const Layer& layer, int index) {
  return index < 0 ? nullptr : layer.params[index];
}

}  // namespace rs
