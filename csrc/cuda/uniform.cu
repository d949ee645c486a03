#include "../codecs/uniform.h"

#include "codecs.h"
#include "encode_slots.h"
#include "loops.cuh"
#include "panel.cuh"
#include "row_grad_input.cuh"
#include "row_product.cuh"
#include "uniform_decoder.cuh"

namespace rs::cuda {
namespace {

// Four lanes decode 32 neighbours with one scale.
constexpr int64_t kGroupUnit = 32;

template <int Bits, bool Symmetric>
struct Decoders {
  template <class T>
  using Of = UniformDecoder<T, Bits, Symmetric>;
};

template <int Bits, bool Symmetric>
CudaRow row_of(int64_t group) {
  using Codec = Uniform<Bits, Symmetric>;
  CudaRow row = loop_row<Codec>();
  if constexpr (Bits == 4 || Bits == 8) {
    if (group % 8 == 0) {
      row.decode = decode_panel<Codec, Bits>;
      row_grad_input_slot<Codec, Bits>(row);
    }
    if (group % kGroupUnit == 0) row_product_slot<Decoders<Bits, Symmetric>::template Of>(row);
  }
  return row;
}

template <int Bits>
CudaRow row_of(int bits, bool symmetric, int64_t group) {
  if (bits == Bits) return symmetric ? row_of<Bits, true>(group) : row_of<Bits, false>(group);
  if constexpr (Bits < 8) return row_of<Bits + 1>(bits, symmetric, group);
  return {};
}

}  // namespace

CudaRow uniform_row(const Term& term) {
  CudaRow row = row_of<2>(static_cast<int>(term.spec.number("bits", 4)),
                          term.spec.flag("symmetric", false), term.row.tile.cols);
  uniform_encode_slots(row, term);
  return row;
}

}  // namespace rs::cuda
