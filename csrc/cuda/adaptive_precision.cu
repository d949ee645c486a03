#include "../codecs/adaptive_precision.h"

#include "codecs.h"
#include "loops.cuh"

namespace rs::cuda {

CudaRow adaptive_precision_row(const Term&) { return loop_row<AdaptivePrecision>(); }

}  // namespace rs::cuda
