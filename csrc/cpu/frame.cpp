#include "frame.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "clones.h"
#include "half.h"

namespace rs {
namespace {

using Lanes = float __attribute__((vector_size(32)));
using Index = int32_t __attribute__((vector_size(32)));
constexpr int64_t kLanes = 8, kLargest = 128;

// A stage inside a vector: lane i becomes v[i] + v[i^h], or v[i^h] - v[i] where i has bit h.
#define RS_STAGE(v, a, b, c, d, e, f, g, h, s, t, u)                    \
  v = __builtin_shuffle(v, Index{a, b, c, d, e, f, g, h}) + v * Lanes { \
    1, s, t, s *t, u, s *u, t *u, s * t * u                             \
  }

// Runs of 8 to 128 values, each in registers from the first stage to the last.
RS_CLONES void transform_runs(float* x, int64_t count, int64_t block, float norm) {
  const int64_t vectors = block / kLanes;
  for (float* run = x; run < x + count; run += block) {
    Lanes v[kLargest / kLanes];
    std::memcpy(v, run, static_cast<size_t>(block) * sizeof(float));
    for (int64_t i = 0; i < vectors; ++i) {
      RS_STAGE(v[i], 1, 0, 3, 2, 5, 4, 7, 6, -1, 1, 1);
      RS_STAGE(v[i], 2, 3, 0, 1, 6, 7, 4, 5, 1, -1, 1);
      RS_STAGE(v[i], 4, 5, 6, 7, 0, 1, 2, 3, 1, 1, -1);
    }
    for (int64_t h = 1; h < vectors; h *= 2)
      for (int64_t i = 0; i < vectors; i += 2 * h)
        for (int64_t j = i; j < i + h; ++j) {
          const Lanes sum = v[j] + v[j + h], difference = v[j] - v[j + h];
          v[j] = sum;
          v[j + h] = difference;
        }
    for (int64_t i = 0; i < vectors; ++i) v[i] = v[i] * norm;
    std::memcpy(run, v, static_cast<size_t>(block) * sizeof(float));
  }
}
#undef RS_STAGE

// Runs of 2 or 4 values.
void transform_short_runs(float* x, int64_t count, int64_t block, float norm) {
  for (float* run = x; run < x + count; run += block) {
    for (int64_t h = 1; h < block; h *= 2)
      for (int64_t i = 0; i < block; i += 2 * h)
        for (int64_t j = i; j < i + h; ++j) {
          const float a = run[j], b = run[j + h];
          run[j] = a + b;
          run[j + h] = a - b;
        }
    for (int64_t i = 0; i < block; ++i) run[i] *= norm;
  }
}

constexpr int64_t kStrip = 64;

// All stages on `block` rows of a strip that fits the first-level cache.
RS_CLONES void transform_strip(float (*strip)[kStrip], int64_t block, float norm) {
  for (int64_t h = 1; h < block; h *= 2)
    for (int64_t i = 0; i < block; i += 2 * h)
      for (int64_t j = i; j < i + h; ++j)
        for (int64_t c = 0; c < kStrip; ++c) {
          const float a = strip[j][c], b = strip[j + h][c];
          strip[j][c] = a + b;
          strip[j + h][c] = a - b;
        }
  for (int64_t j = 0; j < block; ++j)
    for (int64_t c = 0; c < kStrip; ++c) strip[j][c] *= norm;
}

float norm_of(int64_t block) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
}

}  // namespace

void hadamard_rows(float* x, int64_t rows, int64_t n, int64_t block) {
  if (block == 1) return;
  if (block < kLanes) return transform_short_runs(x, rows * n, block, norm_of(block));
  transform_runs(x, rows * n, block, norm_of(block));
}

void hadamard_columns(float* x, int64_t rows, int64_t n, int64_t block) {
  if (block == 1) return;
  float strip[kLargest][kStrip] = {};
  for (float* run = x; run < x + rows * n; run += block * n)
    for (int64_t c = 0; c < n; c += kStrip) {
      const size_t bytes = static_cast<size_t>(std::min(kStrip, n - c)) * sizeof(float);
      for (int64_t j = 0; j < block; ++j) std::memcpy(strip[j], run + j * n + c, bytes);
      transform_strip(strip, block, norm_of(block));
      for (int64_t j = 0; j < block; ++j) std::memcpy(run + j * n + c, strip[j], bytes);
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
    hadamard_rows(row.data(), 1, n, block);
    if (after) multiply(row.data(), after, row.data(), n);
    if (y.bf16)
      narrow(row.data(), static_cast<uint16_t*>(y.data) + r * y.stride, width);
    else
      std::copy(row.begin(), row.begin() + width, static_cast<float*>(y.data) + r * y.stride);
  }
}

}  // namespace rs
