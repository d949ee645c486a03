#include "../codecs/cyclic.h"

#include "codecs.h"
#include "cyclic_integer.h"
#include "loops.cuh"

namespace rs::cuda {
namespace {

template <class Word, int Unit>
struct CyclicUnits {
  static constexpr int kUnit = Unit, kGain = 2;  // the largest factor is 1.98

  struct Tables {
    const float* basis;
    int64_t block;
    RS_HD explicit Tables(const LayerView& layer)
        : basis(layer.params[kCyclicBasis]), block(layer.tile.cols) {}
  };

  RS_HD static float factor(uint32_t word) {
    return mul(static_cast<float>(cyclic_level<Word>(word)), 1.0f / (1 << Word::kShift));
  }
  RS_HD static void decode(const uint8_t* tile, int64_t, int64_t, int unit, const Tables& t,
                           float* w) {
    const uint32_t word = cyclic_word<Word>(tile);
    const float* vector = t.basis + Word::index(word) * t.block + unit * Unit;
    for (int k = 0; k < Unit; ++k) w[k] = mul(factor(word), vector[k]);
  }

  // Shared sums: the gradient of the basis.
  RS_HD static int64_t sums(const LayerView& layer) { return Word::kVectors * layer.tile.cols; }
  template <class Sums>
  RS_HD static void adjoint(const uint8_t* tile, int64_t, int64_t, int unit, const Tables& t,
                            const float* dw, Sums& sums) {
    const uint32_t word = cyclic_word<Word>(tile);
    const int64_t first = Word::index(word) * t.block + unit * Unit;
    for (int k = 0; k < Unit; ++k) sums.shared(first + k, factor(word) * dw[k]);
  }
  RS_HD static void fold(int f, const Tables&, const double* sum, float* const* grads) {
    if (grads[kCyclicBasis]) grads[kCyclicBasis][f] += static_cast<float>(sum[f]);
  }
};

template <class Word>
CudaRow row_of(const Term& term) {
  const int64_t block = term.row.tile.cols, sums = Word::kVectors * block;
  CudaRow row =
      block % 8 ? loop_row<CyclicUnits<Word, 1>>(sums) : loop_row<CyclicUnits<Word, 8>>(sums);
  if (term.spec.word("activation", "float") == "int8") cyclic_integer_slots<Word>(row);
  return row;
}

}  // namespace

CudaRow cyclic_row(const Term& term) {
  if (term.spec.number("word", 16) == 32) return row_of<Cyclic32Word>(term);
  return term.spec.flag("compound", false) ? row_of<CyclicCompoundWord>(term)
                                           : row_of<Cyclic16Word>(term);
}

}  // namespace rs::cuda
