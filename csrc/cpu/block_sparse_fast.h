// Fast slots of block_sparse.
#pragma once

#include <algorithm>
#include <vector>

#include "fast.h"

namespace rs {

// Sum of a[i] * b[i] in float64.
double wide_dot(const float* a, const float* b, int64_t n);

// Gradient of the scale: the weights of a scale of one, met by dw[(row1-row0) * in].
template <void (*Decode)(const Layer&, int64_t, int64_t, float*)>
void block_sparse_adjoint(const Layer& layer, int64_t row0, int64_t row1, const float* dw,
                          float* const* grads) {
  if (!grads[0]) return;
  const float one = 1.0f;
  Layer unscaled = layer;
  unscaled.params[0] = &one;
  const int64_t band = layer.tile.rows * layer.in;
  const int64_t step = std::max<int64_t>(1, (int64_t{1} << 15) / band) * layer.tile.rows;
  std::vector<float> w(static_cast<size_t>(std::min(step, row1 - row0) * layer.in));
  double sum = 0;
  for (int64_t r = row0; r < row1; r += step) {
    const int64_t end = std::min(r + step, row1);
    Decode(unscaled, r, end, w.data());
    sum += wide_dot(w.data(), dw + (r - row0) * layer.in, (end - r) * layer.in);
  }
  grads[0][0] += static_cast<float>(sum);
}

void block_sparse_avx2_slots(Row& row, bool square, bool mask16);
void block_sparse_avx512_slots(Row& row, bool square, bool mask16);

inline void block_sparse_fast_slots(Row& row, bool square, bool mask16, Isa isa) {
#if RS_FAST_X86
  if (isa >= Isa::avx2) block_sparse_avx2_slots(row, square, mask16);
  if (isa >= Isa::avx512) block_sparse_avx512_slots(row, square, mask16);
#endif
}

}  // namespace rs
