// The products of `cyclic` with activation="int8" on the integer tensor cores. What they compute is
// in cpu/cyclic_product.h; sums are exact, so the results are the processor's bits.
#pragma once

#include "row.h"

namespace rs::cuda {

constexpr int kQuantumTop = 127;  // of x and of the basis in 8 bits

// Each row of x (rows, n) as int8, zeros from n to the stride, and its unit: of cyclic_quantum.cu.
cudaError_t quantise_rows(const float* x, int64_t rows, int64_t n, int64_t stride, int8_t* q,
                          float* units, cudaStream_t stream);

// Fills linear and grad_input.
template <class Word>
void cyclic_integer_slots(CudaRow& row);

}  // namespace rs::cuda
