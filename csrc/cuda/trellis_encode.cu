#include "encode_slots.h"
#include "viterbi.h"

namespace rs::cuda {
namespace {

TrellisTargets targets_of(const LayerView& layer, const float* w) {
  return {w, layer.out, layer.in, layer.params[0], layer.params[1]};
}

// Importance is left to the scales and to error feedback, as on the CPU.
template <int K, Search search>
cudaError_t encode(const LayerView& layer, const float* w, const float*, uint8_t* codes,
                   float* const*, void* scratch, cudaStream_t stream) {
  return viterbi(targets_of(layer, w), K, search, codes, scratch, stream);
}

template <int K>
int64_t encode_scratch(const LayerView& layer) {
  return viterbi_scratch(targets_of(layer, nullptr), K);
}

}  // namespace

void trellis_encode_slots(CudaRow& row, const Term& term) {
  const bool fast = term.spec.word("search", "exact") == "fast";
  with_trellis_bits(static_cast<int>(2 * term.spec.number("bits", 2)), [&]<int K> {
    row.encode = fast ? encode<K, Search::fast> : encode<K, Search::exact>;
    row.encode_scratch = encode_scratch<K>;
  });
}

}  // namespace rs::cuda
