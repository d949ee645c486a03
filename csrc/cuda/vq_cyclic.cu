#include "../codecs/vq_cyclic.h"

#include "codecs.h"
#include "encode_slots.h"
#include "loops.cuh"

namespace rs::cuda {

CudaRow vq_cyclic_row(const Term&) {
  CudaRow row = loop_row<VqCyclic>();
  vq_cyclic_encode_slots(row);
  return row;
}

}  // namespace rs::cuda
