// ultra on AVX2: vectors loaded from the codebook as the layer sees it.
#include "../codecs/ultra.h"
#include "fast.h"

#if RS_FAST_X86
#include "lanes_avx2.h"
#include "ultra_vectors.h"

namespace rs {
namespace {

struct UltraRows {
  static constexpr bool kGrouped = false;
  const Layer& layer;
  VectorTable<Ultra::kVectors, 4> vectors;

  explicit UltraRows(const Layer& layer) : layer(layer) { ultra_vectors(layer, vectors.at); }
  template <class Visit>
  RS_INLINE void each(int64_t row, int64_t tile0, int64_t tile1, Visit visit) const {
    ten_bit_vectors(layer, row, tile0, tile1, vectors, visit);
  }
};

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {

void ultra_avx2_slots(Row& row) { fill_float_slots<UltraRows>(row); }

}  // namespace rs
#endif
