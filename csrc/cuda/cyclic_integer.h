// The products of `cyclic` with activation="int8" on the integer tensor cores. What they compute is
// in cpu/cyclic_product.h; sums are exact, so the results are the processor's bits.
#pragma once

#include "row.h"

namespace rs::cuda {

// Fills linear and grad_input.
template <class Word>
void cyclic_integer_slots(CudaRow& row);

}  // namespace rs::cuda
