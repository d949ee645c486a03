#include "frame.h"

#include <cmath>

#include "clones.h"

namespace rs {
namespace {

RS_CLONES void butterfly(float* __restrict a, float* __restrict b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float sum = a[i] + b[i], difference = a[i] - b[i];
    a[i] = sum;
    b[i] = difference;
  }
}

RS_CLONES void stages_of_one_run(float* x, int64_t block) {
  for (int64_t h = 1; h < block && h < 8; h *= 2)
    for (int64_t i = 0; i < block; i += 2 * h)
      for (int64_t j = i; j < i + h; ++j) {
        const float a = x[j], b = x[j + h];
        x[j] = a + b;
        x[j + h] = a - b;
      }
}

RS_CLONES void scale(float* x, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

float norm(int64_t block) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(block))); }

}  // namespace

void hadamard_rows(float* x, int64_t rows, int64_t n, int64_t block) {
  if (block == 1) return;
  for (float* run = x; run < x + rows * n; run += block) {
    stages_of_one_run(run, block);
    for (int64_t h = 8; h < block; h *= 2)
      for (int64_t i = 0; i < block; i += 2 * h) butterfly(run + i, run + i + h, h);
  }
  scale(x, rows * n, norm(block));
}

void hadamard_columns(float* x, int64_t rows, int64_t n, int64_t block) {
  if (block == 1) return;
  for (float* run = x; run < x + rows * n; run += block * n)
    for (int64_t h = 1; h < block; h *= 2)
      for (int64_t i = 0; i < block; i += 2 * h)
        for (int64_t j = i; j < i + h; ++j) butterfly(run + j * n, run + (j + h) * n, n);
  scale(x, rows * n, norm(block));
}

}  // namespace rs
