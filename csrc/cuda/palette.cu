#include "../codecs/palette.h"

#include "codecs.h"
#include "encode_slots.h"
#include "loops.cuh"

namespace rs::cuda {
namespace {

template <class Index>
CudaRow row_of(bool grouped) {
  return grouped ? loop_row<Palette<Index, true>>() : loop_row<Palette<Index, false>>();
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
