#include "frame.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "clones.h"
#include "half.h"

namespace rs {
namespace {

using Lanes = float __attribute__((vector_size(64)));
using Words = int32_t __attribute__((vector_size(64)));
constexpr int64_t kLanes = 16, kLargest = 128;

// The stages that join vectors: of N vectors, those h = 1, 2, 4, ... apart.
template <int N>
RS_INLINE void join(Lanes* v) {
#pragma GCC unroll 4
  for (int h = 1; h < N; h *= 2)
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i)
      if (!(i & h)) {
        const Lanes sum = v[i] + v[i + h], difference = v[i] - v[i + h];
        v[i] = sum;
        v[i + h] = difference;
      }
}

// A product by +-1 is exact, and so is its sum in one rounding.
#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")

// A stage inside a vector: lane i becomes v[i] + v[i^h], or v[i^h] - v[i] where i has bit h.
RS_INLINE void turn(Lanes& v, const Words& across, const Lanes& sign) {
  v = __builtin_shuffle(v, across) + v * sign;
}

template <int N>
RS_INLINE void transform_run(const float* from, float* to, float norm) {
  constexpr float m = -1;
  Lanes v[N];
  std::memcpy(v, from, sizeof v);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    turn(v[i], Words{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14},
         Lanes{1, m, 1, m, 1, m, 1, m, 1, m, 1, m, 1, m, 1, m});
    turn(v[i], Words{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13},
         Lanes{1, 1, m, m, 1, 1, m, m, 1, 1, m, m, 1, 1, m, m});
    turn(v[i], Words{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11},
         Lanes{1, 1, 1, 1, m, m, m, m, 1, 1, 1, 1, m, m, m, m});
    turn(v[i], Words{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7},
         Lanes{1, 1, 1, 1, 1, 1, 1, 1, m, m, m, m, m, m, m, m});
  }
  join<N>(v);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) v[i] = v[i] * norm;
  std::memcpy(to, v, sizeof v);
}

// Runs of 16 to 128 values, each in registers from the first stage to the last.
RS_CLONES void transform_runs(const float* from, int64_t from_stride, float* to, int64_t to_stride,
                              int64_t rows, int64_t n, int64_t block, float norm) {
  for (; rows; --rows, from += from_stride, to += to_stride)
    for (int64_t i = 0; i < n; i += block) {
      if (block == 128) transform_run<8>(from + i, to + i, norm);
      if (block == 64) transform_run<4>(from + i, to + i, norm);
      if (block == 32) transform_run<2>(from + i, to + i, norm);
      if (block == 16) transform_run<1>(from + i, to + i, norm);
    }
}

#pragma GCC pop_options

// Runs of 2 to 8 values.
void transform_short_runs(const float* from, float* to, int64_t count, int64_t block, float norm) {
  for (int64_t at = 0; at < count; at += block) {
    float run[kLanes];
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

// All stages of N rows at each of `count` places, `next` apart: rows are `apart` apart.
template <int N>
RS_INLINE void pass(const float* from, int64_t from_apart, int64_t from_next, float* to,
                    int64_t to_apart, int64_t to_next, int64_t count, float norm) {
  for (; count; --count, from += from_next, to += to_next) {
    Lanes v[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) std::memcpy(&v[i], from + i * from_apart, sizeof v[i]);
    join<N>(v);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      v[i] = v[i] * norm;
      std::memcpy(to + i * to_apart, &v[i], sizeof v[i]);
    }
  }
}

// Sixteen columns of `block` rows, `stride` apart: up to 16 neighbouring rows at a time, then those
// 16 apart. In between they lie close together, in the first-level cache.
RS_CLONES void transform_columns(float* x, int64_t stride, int64_t block, float norm) {
  if (block == 2) return pass<2>(x, stride, 0, x, stride, 0, 1, norm);
  if (block == 4) return pass<4>(x, stride, 0, x, stride, 0, 1, norm);
  if (block == 8) return pass<8>(x, stride, 0, x, stride, 0, 1, norm);
  if (block == 16) return pass<16>(x, stride, 0, x, stride, 0, 1, norm);
  alignas(64) float close[kLargest * kLanes];
  pass<16>(x, stride, 16 * stride, close, kLanes, 16 * kLanes, block / 16, 1.0f);
  if (block == 32) pass<2>(close, 16 * kLanes, kLanes, x, 16 * stride, stride, 16, norm);
  if (block == 64) pass<4>(close, 16 * kLanes, kLanes, x, 16 * stride, stride, 16, norm);
  if (block == 128) pass<8>(close, 16 * kLanes, kLanes, x, 16 * stride, stride, 16, norm);
}

float norm_of(int64_t block) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
}

}  // namespace

void hadamard_rows(const float* from, int64_t from_stride, float* to, int64_t to_stride,
                   int64_t rows, int64_t n, int64_t block) {
  if (block >= kLanes)
    return transform_runs(from, from_stride, to, to_stride, rows, n, block, norm_of(block));
  for (; rows; --rows, from += from_stride, to += to_stride) {
    if (block > 1)
      transform_short_runs(from, to, n, block, norm_of(block));
    else if (from != to)
      std::copy(from, from + n, to);
  }
}

void hadamard_columns(float* x, int64_t rows, int64_t n, int64_t stride, int64_t block) {
  if (block == 1) return;
  for (float* run = x; run < x + rows * stride; run += block * stride) {
    int64_t c = 0;
    for (; c + kLanes <= n; c += kLanes) transform_columns(run + c, stride, block, norm_of(block));
    if (c == n) continue;
    alignas(64) float rest[kLargest * kLanes] = {};
    const size_t bytes = static_cast<size_t>(n - c) * sizeof(float);
    for (int64_t j = 0; j < block; ++j) std::memcpy(rest + j * kLanes, run + j * stride + c, bytes);
    transform_columns(rest, kLanes, block, norm_of(block));
    for (int64_t j = 0; j < block; ++j) std::memcpy(run + j * stride + c, rest + j * kLanes, bytes);
  }
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
