#include "../codecs/hierarchical.h"

#include "codecs.h"
#include "hierarchical_decoder.cuh"
#include "loops.cuh"
#include "panel.cuh"
#include "row_grad_input.cuh"
#include "row_product.cuh"

namespace rs::cuda {
namespace {

template <class T>
using Mul = HierarchicalDecoder<T, MulValues>;
template <class T>
using Xor = HierarchicalDecoder<T, XorValues>;

template <class Mode, template <class> class Decoder>
CudaRow row_of() {
  CudaRow row = loop_row<Hierarchical<Mode>>();
  row.decode = decode_panel<Hierarchical<Mode>, 4>;
  row_product_slot<Decoder>(row);
  row_grad_input_slot<Hierarchical<Mode>, 4>(row);
  return row;
}

}  // namespace

CudaRow hierarchical_row(const Term& term) {
  return term.spec.word("mode", "mul") == "mul" ? row_of<MulMode, Mul>() : row_of<XorMode, Xor>();
}

}  // namespace rs::cuda
