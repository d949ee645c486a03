// The encode slots: what <codec>.cu puts into its row, from <codec>_encode.cu.
#pragma once

#include "row.h"

namespace rs::cuda {

void trellis_encode_slots(CudaRow& row, const Term& term);
void uniform_encode_slots(CudaRow& row, const Term& term);

}  // namespace rs::cuda
