#include "dots.h"

#include <cstring>

#include "clones.h"

namespace rs {
namespace {

constexpr int64_t kLanes = 16;
using Floats = float __attribute__((vector_size(4 * kLanes)));
// Sixteen floats in place: no vector is returned by value, which would need one ABI for all.
using Unaligned = float __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
inline const Unaligned& load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }

// R rows of w with M of x: R * M sums stay in registers, each loaded vector is used M or R times.
template <int R, int M>
RS_FLAT void block(const float* w, const float* x, int64_t n, float* y, int64_t stride) {
  Floats sum[R][M] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    Floats a[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) a[r] = load(w + r * n + j);
#pragma GCC unroll 4
    for (int b = 0; b < M; ++b) {
      const Floats c = load(x + b * n + j);
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

// V vectors of columns of M rows of dx stay in registers while the rows of w pass by.
template <int M, int V>
RS_FLAT void columns(const float* w, int64_t rows, const float* dy, int64_t stride, int64_t n,
                     float* dx) {
  Floats sum[M][V];
#pragma GCC unroll 4
  for (int b = 0; b < M; ++b)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[b][v] = load(dx + b * n + v * kLanes);
  for (int64_t i = 0; i < rows; ++i) {
    Floats a[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) a[v] = load(w + i * n + v * kLanes);
#pragma GCC unroll 4
    for (int b = 0; b < M; ++b)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[b][v] += dy[b * stride + i] * a[v];
  }
#pragma GCC unroll 4
  for (int b = 0; b < M; ++b)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) *reinterpret_cast<Unaligned*>(dx + b * n + v * kLanes) = sum[b][v];
}

template <int M>
RS_FLAT void add_to(const float* w, int64_t rows, const float* dy, int64_t stride, int64_t n,
                    float* dx) {
  int64_t j = 0;
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) columns<M, 2>(w + j, rows, dy, stride, n, dx + j);
  for (; j + kLanes <= n; j += kLanes) columns<M, 1>(w + j, rows, dy, stride, n, dx + j);
  for (int64_t i = 0; i < rows; ++i)
    for (int b = 0; b < M; ++b)
      for (int64_t k = j; k < n; ++k) dx[b * n + k] += dy[b * stride + i] * w[i * n + k];
}

}  // namespace

RS_CLONES void dots(const float* w, int64_t rows, const float* x, int64_t m, int64_t n, float* y,
                    int64_t stride) {
  int64_t b = 0;
  for (; b + 4 <= m; b += 4) strip<2, 4>(w, rows, x + b * n, n, y + b * stride, stride);
  for (; b + 2 <= m; b += 2) strip<4, 2>(w, rows, x + b * n, n, y + b * stride, stride);
  if (b < m) strip<8, 1>(w, rows, x + b * n, n, y + b * stride, stride);
}

RS_CLONES void add_rows(const float* w, int64_t rows, const float* dy, int64_t m, int64_t stride,
                        int64_t n, float* dx) {
  int64_t b = 0;
  for (; b + 4 <= m; b += 4) add_to<4>(w, rows, dy + b * stride, stride, n, dx + b * n);
  for (; b < m; ++b) add_to<1>(w, rows, dy + b * stride, stride, n, dx + b * n);
}

}  // namespace rs
