#include "../codecs/palette.h"

#include "codecs.h"
#include "encode_slots.h"
#include "loops.cuh"
#include "palette_decoder.cuh"
#include "panel.cuh"
#include "row_grad_input.cuh"
#include "row_product.cuh"

namespace rs::cuda {
namespace {

template <class T>
using Dense3 = PaletteDecoder<T, 3, false>;
template <class T>
using Dense4 = PaletteDecoder<T, 4, false>;
template <class T>
using Words3 = PaletteDecoder<T, 3, true>;

template <class Index>
CudaRow row_of(bool grouped) {
  if (grouped) return loop_row<Palette<Index, true>>();
  using Codec = Palette<Index, false>;
  CudaRow row = loop_row<Codec>();
  if constexpr (std::is_same_v<Index, DenseIndex<3>>) {
    row.decode = decode_panel<Codec, 3>;
    row_product_slot<Dense3>(row);
    row_grad_input_slot<Codec, 3>(row);
  }
  if constexpr (std::is_same_v<Index, DenseIndex<4>>) {
    row.decode = decode_panel<Codec, 4>;
    row_product_slot<Dense4>(row);
    row_grad_input_slot<Codec, 4, true>(row);  // tiles of two weights
  }
  if constexpr (std::is_same_v<Index, WordIndex>) row_product_slot<Words3>(row);
  return row;
}

CudaRow decoding_row(const Term& term) {
  const bool grouped = term.spec.number("group", 0) != 0;
  const std::string layout = term.spec.word("layout", "dense");
  if (layout == "words") return row_of<WordIndex>(grouped);
  if (layout == "pair") return loop_row<Palette<PairIndex, false>>();
  switch (static_cast<int>(term.spec.number("bits", 3))) {
    case 1:
      return row_of<DenseIndex<1>>(grouped);
    case 2:
      return row_of<DenseIndex<2>>(grouped);
    case 3:
      return row_of<DenseIndex<3>>(grouped);
    default:
      return row_of<DenseIndex<4>>(grouped);
  }
}

}  // namespace

CudaRow palette_row(const Term& term) {
  CudaRow row = decoding_row(term);
  palette_encode_slots(row, term);
  return row;
}

}  // namespace rs::cuda
