// The encode slots: what <codec>.cu puts into its row, from <codec>_encode.cu.
#pragma once

#include "row.h"

namespace rs::cuda {

void palette_encode_slots(CudaRow& row, const Term& term);
void trellis_encode_slots(CudaRow& row, const Term& term);
void uniform_encode_slots(CudaRow& row, const Term& term);
void vq_cyclic_encode_slots(CudaRow& row);

}  // namespace rs::cuda
