// The frame around T: scales and block Hadamard transforms, on blocks that fit the cache.
// A Hadamard transform of 2^b values is b stages of a + b, a - b in a fixed order and one product
// by fl32(2^(-b/2)): the same float32 bits in any implementation that keeps the stages.
#pragma once

#include <cstdint>

namespace rs {

// A side of the squares on which every frame closes, and how far apart their rows lie: not a power
// of two, which would map a column to few places of the caches.
constexpr int64_t kSquare = 128, kSquareApart = kSquare + 16;

// Transforms each run of `block` of the n values of each row at `from`; `to` may be the same.
void hadamard_rows(const float* from, int64_t from_stride, float* to, int64_t to_stride,
                   int64_t rows, int64_t n, int64_t block);
// Transforms each run of `block` rows, `stride` apart, of the first n columns of a row-major matrix
// in place; block divides rows.
void hadamard_columns(float* x, int64_t rows, int64_t n, int64_t stride, int64_t block);

// Rows of float32 or bfloat16 values, `stride` apart.
struct Rows {
  void* data;
  int64_t stride;
  bool bf16;
};

// Each row of y, `width` wide, is after * Hadamard(before * x) of the first n values of a row of x,
// and zeros behind them. Null scales are ones; block 1 is no transform. In float32, rounded once.
void frame_rows(Rows x, Rows y, int64_t rows, int64_t n, int64_t width, const float* before,
                int64_t block, const float* after);

}  // namespace rs
