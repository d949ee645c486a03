#include "frame.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "clones.h"
#include "half.h"
#include "widths.h"

namespace rs {
namespace {

constexpr int64_t kLargest = 128;
constexpr int kMost = 8;  // vectors in registers from the first stage to the last

template <int L>
using Floats = VectorOf<float, L>;

// The stages that join vectors: of N vectors, those h = 1, 2, 4, ... apart.
template <int N, class V>
RS_INLINE void join(V* v) {
#pragma GCC unroll 4
  for (int h = 1; h < N; h *= 2)
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i)
      if (!(i & h)) {
        const V sum = v[i] + v[i + h], difference = v[i] - v[i + h];
        v[i] = sum;
        v[i + h] = difference;
      }
}

// A stage inside a vector: lane i becomes v[i] + v[i^h], or v[i^h] - v[i] where i has bit h. A
// product by +-1 is exact, and so is its sum in one rounding.
template <int L, int h>
RS_INLINE void turn(Floats<L>& v) {
  VectorOf<int32_t, L> across;
  Floats<L> sign;
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) across[i] = i ^ h, sign[i] = i & h ? -1.0f : 1.0f;
  const Floats<L> other = __builtin_shuffle(v, across);
#if RS_FAST_X86
  if constexpr (L >= 8)
    asm("vfmadd213ps %2, %1, %0" : "+v"(v) : "v"(sign), "v"(other));
  else
#endif
    v = other + v * sign;
}

// N vectors.
template <int L, int N>
RS_INLINE void transform_run(const float* from, float* to, float norm) {
  Floats<L> v[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    v[i] = at<float, L>(from + i * L);
    turn<L, 1>(v[i]);
    turn<L, 2>(v[i]);
    if constexpr (L > 4) turn<L, 4>(v[i]);
    if constexpr (L > 8) turn<L, 8>(v[i]);
  }
  join<N>(v);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) at<float, L>(to + i * L) = v[i] * norm;
}

// A block of 16 to 128 values: in runs of up to kMost vectors, then the stages that join runs.
template <int L>
RS_INLINE void transform_block(const float* from, float* to, int64_t block, float norm) {
  const int64_t run = std::min<int64_t>(block, kMost * L);
  const float first = run == block ? norm : 1.0f;
  for (int64_t i = 0; i < block; i += run) {
    if (run == 8 * L) transform_run<L, 8>(from + i, to + i, first);
    if (run == 4 * L) transform_run<L, 4>(from + i, to + i, first);
    if (run == 2 * L) transform_run<L, 2>(from + i, to + i, first);
    if (run == L) transform_run<L, 1>(from + i, to + i, first);
  }
  for (int64_t h = run; h < block; h *= 2) {
    const float last = 2 * h == block ? norm : 1.0f;
    for (int64_t i = 0; i < block; i += 2 * h)
      for (int64_t j = i; j < i + h; j += L) {
        const Floats<L> a = at<float, L>(to + j), b = at<float, L>(to + j + h);
        at<float, L>(to + j) = (a + b) * last;
        at<float, L>(to + j + h) = (a - b) * last;
      }
  }
}

// Runs of 2 to 8 values.
void transform_short_runs(const float* from, float* to, int64_t count, int64_t block, float norm) {
  for (int64_t at = 0; at < count; at += block) {
    float run[8];
    std::copy(from + at, from + at + block, run);
    for (int64_t h = 1; h < block; h *= 2)
      for (int64_t i = 0; i < block; i += 2 * h)
        for (int64_t j = i; j < i + h; ++j) {
          const float a = run[j], b = run[j + h];
          run[j] = a + b;
          run[j + h] = a - b;
        }
    for (int64_t i = 0; i < block; ++i) to[at + i] = run[i] * norm;
  }
}

// All stages of N rows of L columns at each of `count` places, `next` apart: rows are `apart`
// apart.
template <int L, int N>
RS_INLINE void pass(const float* from, int64_t from_apart, int64_t from_next, float* to,
                    int64_t to_apart, int64_t to_next, int64_t count, float norm) {
  for (; count; --count, from += from_next, to += to_next) {
    Floats<L> v[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) v[i] = at<float, L>(from + i * from_apart);
    join<N>(v);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) at<float, L>(to + i * to_apart) = v[i] * norm;
  }
}

// L columns of `block` rows, `stride` apart: up to 16 neighbouring rows at a time, then those 16
// apart. In between they lie close together, in the first-level cache.
template <int L>
RS_INLINE void transform_columns(float* x, int64_t stride, int64_t block, float norm) {
  if (block == 2) return pass<L, 2>(x, stride, 0, x, stride, 0, 1, norm);
  if (block == 4) return pass<L, 4>(x, stride, 0, x, stride, 0, 1, norm);
  if (block == 8) return pass<L, 8>(x, stride, 0, x, stride, 0, 1, norm);
  if (block == 16) return pass<L, 16>(x, stride, 0, x, stride, 0, 1, norm);
  float close[kLargest * L];
  pass<L, 16>(x, stride, 16 * stride, close, L, 16 * L, block / 16, 1.0f);
  if (block == 32) pass<L, 2>(close, 16 * L, L, x, 16 * stride, stride, 16, norm);
  if (block == 64) pass<L, 4>(close, 16 * L, L, x, 16 * stride, stride, 16, norm);
  if (block == 128) pass<L, 8>(close, 16 * L, L, x, 16 * stride, stride, 16, norm);
}

// All columns of a block of rows.
template <int L>
RS_INLINE void transform_rows(float* x, int64_t n, int64_t stride, int64_t block, float norm) {
  int64_t c = 0;
  for (; c + L <= n; c += L) transform_columns<L>(x + c, stride, block, norm);
  if (c == n) return;
  float rest[kLargest * L] = {};
  const size_t bytes = static_cast<size_t>(n - c) * sizeof(float);
  for (int64_t j = 0; j < block; ++j) std::memcpy(rest + j * L, x + j * stride + c, bytes);
  transform_columns<L>(rest, L, block, norm);
  for (int64_t j = 0; j < block; ++j) std::memcpy(x + j * stride + c, rest + j * L, bytes);
}

float norm_of(int64_t block) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
}

}  // namespace

void hadamard_rows(const float* from, int64_t from_stride, float* to, int64_t to_stride,
                   int64_t rows, int64_t n, int64_t block) {
  const float norm = norm_of(block);
  if (block >= 16)
    return by_width([&]<int L>() RS_LAMBDA {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < n; i += block)
          transform_block<L>(from + r * from_stride + i, to + r * to_stride + i, block, norm);
    });
  for (; rows; --rows, from += from_stride, to += to_stride) {
    if (block > 1)
      transform_short_runs(from, to, n, block, norm);
    else if (from != to)
      std::copy(from, from + n, to);
  }
}

void hadamard_columns(float* x, int64_t rows, int64_t n, int64_t stride, int64_t block) {
  if (block == 1) return;
  const float norm = norm_of(block);
  by_width([&]<int L>() RS_LAMBDA {
    for (int64_t r = 0; r < rows; r += block)
      transform_rows<L>(x + r * stride, n, stride, block, norm);
  });
}

namespace {

RS_CLONES void widen(const uint16_t* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = std::bit_cast<float>(static_cast<uint32_t>(x[i]) << 16);
}

RS_CLONES void narrow(const float* x, uint16_t* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = to_bf16(x[i]);
}

RS_CLONES void multiply(const float* x, const float* scale, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] * scale[i];
}

}  // namespace

void frame_rows(Rows x, Rows y, int64_t rows, int64_t n, int64_t width, const float* before,
                int64_t block, const float* after) {
  std::vector<float> row(static_cast<size_t>(width > n ? width : n));
  for (int64_t r = 0; r < rows; ++r) {
    if (x.bf16) widen(static_cast<const uint16_t*>(x.data) + r * x.stride, row.data(), n);
    const float* values = x.bf16 ? row.data() : static_cast<const float*>(x.data) + r * x.stride;
    if (before)
      multiply(values, before, row.data(), n);
    else if (!x.bf16)
      std::copy(values, values + n, row.data());
    hadamard_rows(row.data(), n, row.data(), n, 1, n, block);
    if (after) multiply(row.data(), after, row.data(), n);
    if (y.bf16)
      narrow(row.data(), static_cast<uint16_t*>(y.data) + r * y.stride, width);
    else
      std::copy(row.begin(), row.begin() + width, static_cast<float*>(y.data) + r * y.stride);
  }
}

}  // namespace rs
