// The fast slots of trellis, each in a file of its own. `k` is its new bits per state, 3 to 8.
#pragma once

#include "row.h"

namespace rs::cuda {

void trellis_linear_slots(CudaRow& row, int k);
void trellis_grad_input_slots(CudaRow& row, int k);
void trellis_decode_slots(CudaRow& row, int k);
void trellis_adjoint_slots(CudaRow& row, int k);

}  // namespace rs::cuda
