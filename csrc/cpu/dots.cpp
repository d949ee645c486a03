#include "dots.h"

#include <cstring>

#include "widths.h"

namespace rs {
namespace {

constexpr int kLanes = 16;  // partial sums of a product, in registers of L

// R rows of w with M of x: R * M sums stay in registers, each loaded vector is used M or R times.
template <int L, int R, int M>
RS_INLINE void block(const float* w, const float* x, int64_t n, float* y, int64_t stride) {
  constexpr int V = kLanes / L;
  VectorOf<float, L> sum[R][M][V] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      VectorOf<float, L> a[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) a[r] = at<float, L>(w + r * n + j + v * L);
#pragma GCC unroll 4
      for (int b = 0; b < M; ++b) {
        const VectorOf<float, L> c = at<float, L>(x + b * n + j + v * L);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sum[r][b][v] += a[r] * c;
      }
    }
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < M; ++b) {
      float lanes[kLanes];
      std::memcpy(lanes, &sum[r][b], sizeof lanes);
      for (int64_t i = j; i < n; ++i) lanes[i - j] += w[r * n + i] * x[b * n + i];
      y[b * stride + r] = sum_lanes(lanes);
    }
}

// All rows of w with M of x, R at a time.
template <int L, int R, int M>
RS_INLINE void strip(const float* w, int64_t rows, const float* x, int64_t n, float* y,
                     int64_t stride) {
  int64_t i = 0;
  for (; i + R <= rows; i += R) block<L, R, M>(w + i * n, x, n, y + i, stride);
  for (; i < rows; ++i) block<L, 1, M>(w + i * n, x, n, y + i, stride);
}

// V vectors of columns of M rows of dx stay in registers while the rows of w pass by.
template <int L, int M, int V>
RS_INLINE void columns(const float* w, int64_t rows, const float* dy, int64_t stride, int64_t n,
                       float* dx) {
  VectorOf<float, L> sum[M][V];
#pragma GCC unroll 4
  for (int b = 0; b < M; ++b)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[b][v] = at<float, L>(dx + b * n + v * L);
  for (int64_t i = 0; i < rows; ++i) {
    VectorOf<float, L> a[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) a[v] = at<float, L>(w + i * n + v * L);
#pragma GCC unroll 4
    for (int b = 0; b < M; ++b)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[b][v] += dy[b * stride + i] * a[v];
  }
#pragma GCC unroll 4
  for (int b = 0; b < M; ++b)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) at<float, L>(dx + b * n + v * L) = sum[b][v];
}

template <int L, int M, int V>
RS_INLINE void add_to(const float* w, int64_t rows, const float* dy, int64_t stride, int64_t n,
                      float* dx) {
  int64_t j = 0;
  for (; j + V * L <= n; j += V * L) columns<L, M, V>(w + j, rows, dy, stride, n, dx + j);
  for (; j + L <= n; j += L) columns<L, M, 1>(w + j, rows, dy, stride, n, dx + j);
  for (int64_t i = 0; i < rows; ++i)
    for (int b = 0; b < M; ++b)
      for (int64_t k = j; k < n; ++k) dx[b * n + k] += dy[b * stride + i] * w[i * n + k];
}

}  // namespace

void dots(const float* w, int64_t rows, const float* x, int64_t m, int64_t n, float* y,
          int64_t stride) {
  by_width([&]<int L>() RS_LAMBDA {
    // Rows at a time by rows of x, so that the sums fit 32 registers, or 16.
    constexpr int kOne = L == 16 ? 8 : 4, kTwo = L == 16 ? 4 : 2, kFour = L == 16 ? 2 : 1;
    int64_t b = 0;
    for (; b + 4 <= m; b += 4) strip<L, kFour, 4>(w, rows, x + b * n, n, y + b * stride, stride);
    for (; b + 2 <= m; b += 2) strip<L, kTwo, 2>(w, rows, x + b * n, n, y + b * stride, stride);
    if (b < m) strip<L, kOne, 1>(w, rows, x + b * n, n, y + b * stride, stride);
  });
}

void add_rows(const float* w, int64_t rows, const float* dy, int64_t m, int64_t stride, int64_t n,
              float* dx) {
  by_width([&]<int L>() RS_LAMBDA {
    constexpr int kOne = L == 16 ? 2 : 4;
    int64_t b = 0;
    for (; b + 4 <= m; b += 4) add_to<L, 4, 2>(w, rows, dy + b * stride, stride, n, dx + b * n);
    for (; b < m; ++b) add_to<L, 1, kOne>(w, rows, dy + b * stride, stride, n, dx + b * n);
  });
}

}  // namespace rs
