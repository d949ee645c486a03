#include "dots.h"

#include <cstring>

#include "clones.h"

namespace rs {
namespace {

constexpr int64_t kLanes = 16;
using Floats = float __attribute__((vector_size(4 * kLanes)));
using Unaligned = float __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// R rows of w with M of x: R * M sums stay in registers, each loaded vector is used M or R times.
template <int R, int M>
RS_FLAT void block(const float* w, const float* x, int64_t n, float* y, int64_t stride) {
  Floats sum[R][M] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    Floats a[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) a[r] = *reinterpret_cast<const Unaligned*>(w + r * n + j);
#pragma GCC unroll 4
    for (int b = 0; b < M; ++b) {
      const Floats c = *reinterpret_cast<const Unaligned*>(x + b * n + j);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][b] += a[r] * c;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < M; ++b) {
      float lanes[kLanes];
      std::memcpy(lanes, &sum[r][b], sizeof lanes);
      for (int64_t i = j; i < n; ++i) lanes[i - j] += w[r * n + i] * x[b * n + i];
      for (int64_t half = kLanes / 2; half; half /= 2)
        for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
      y[b * stride + r] = lanes[0];
    }
}

// All rows of w with M of x, R at a time.
template <int R, int M>
RS_FLAT void strip(const float* w, int64_t rows, const float* x, int64_t n, float* y,
                   int64_t stride) {
  int64_t i = 0;
  for (; i + R <= rows; i += R) block<R, M>(w + i * n, x, n, y + i, stride);
  for (; i < rows; ++i) block<1, M>(w + i * n, x, n, y + i, stride);
}

}  // namespace

RS_CLONES void dots(const float* w, int64_t rows, const float* x, int64_t m, int64_t n, float* y,
                    int64_t stride) {
  int64_t b = 0;
  for (; b + 4 <= m; b += 4) strip<2, 4>(w, rows, x + b * n, n, y + b * stride, stride);
  for (; b + 2 <= m; b += 2) strip<4, 2>(w, rows, x + b * n, n, y + b * stride, stride);
  if (b < m) strip<8, 1>(w, rows, x + b * n, n, y + b * stride, stride);
}

}  // namespace rs
