#include "../codecs/vq_cyclic.h"

#include "codecs.h"
#include "loops.cuh"

namespace rs::cuda {

CudaRow vq_cyclic_row(const Term&) { return loop_row<VqCyclic>(); }

}  // namespace rs::cuda
