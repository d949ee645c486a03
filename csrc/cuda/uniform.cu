#include "../codecs/uniform.h"

#include "codecs.h"
#include "encode_slots.h"
#include "loops.cuh"

namespace rs::cuda {
namespace {

template <int Bits>
CudaRow row_of(int bits, bool symmetric) {
  if (bits == Bits)
    return symmetric ? loop_row<Uniform<Bits, true>>() : loop_row<Uniform<Bits, false>>();
  if constexpr (Bits < 8) return row_of<Bits + 1>(bits, symmetric);
  return {};
}

}  // namespace

CudaRow uniform_row(const Term& term) {
  CudaRow row =
      row_of<2>(static_cast<int>(term.spec.number("bits", 4)), term.spec.flag("symmetric", false));
  uniform_encode_slots(row, term);
  return row;
}

}  // namespace rs::cuda
