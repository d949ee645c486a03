#include "../codecs/trellis.h"

#include "codecs.h"
#include "encode_slots.h"
#include "trellis_slots.h"

namespace rs::cuda {

CudaRow trellis_row(const Term& term) {
  const int k = static_cast<int>(2 * term.spec.number("bits", 2));
  CudaRow row;
  trellis_decode_slots(row, k);
  trellis_linear_slots(row, k);
  trellis_grad_input_slots(row, k);
  trellis_adjoint_slots(row, k);
  trellis_encode_slots(row, term);
  return row;
}

}  // namespace rs::cuda
