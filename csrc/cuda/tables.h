// Tables of constants that several codecs decode with, made on the device by the same fixed
// operations as the host's.
#pragma once

#include "types.h"

namespace rs::cuda {

constexpr int kTurn = 256;

// table[k] = fl32(cos(2 pi k / 256))
cudaError_t turn_cosines(float* table, cudaStream_t stream);

}  // namespace rs::cuda
