#include "../codecs/hierarchical.h"

#include "codecs.h"
#include "loops.cuh"

namespace rs::cuda {

CudaRow hierarchical_row(const Term& term) {
  return term.spec.word("mode", "mul") == "mul" ? loop_row<Hierarchical<MulMode>>()
                                                : loop_row<Hierarchical<XorMode>>();
}

}  // namespace rs::cuda
