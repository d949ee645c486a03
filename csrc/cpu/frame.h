// The frame around T: scales and block Hadamard transforms, on blocks that fit the cache.
// A Hadamard transform of 2^b values is b stages of a + b, a - b in a fixed order and one product
// by fl32(2^(-b/2)): the same float32 bits in any implementation that keeps the stages.
#pragma once

#include <cstdint>

namespace rs {

// Transforms each run of `block` values of `rows` contiguous rows of n, in place.
void hadamard_rows(float* x, int64_t rows, int64_t n, int64_t block);
// Transforms each run of `block` rows of a row-major matrix (rows x n, block divides rows), in
// place.
void hadamard_columns(float* x, int64_t rows, int64_t n, int64_t block);

}  // namespace rs
