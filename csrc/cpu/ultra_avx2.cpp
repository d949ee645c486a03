// ultra on AVX2: vectors loaded from the codebook as the layer sees it.
#include "../codecs/ultra.h"
#include "fast.h"

#if RS_FAST_X86
#include "lanes_avx2.h"

namespace rs {
namespace {

struct UltraRows {
  static constexpr bool kGrouped = false;
  const Layer& layer;
  VectorTable<Ultra::kVectors, 4> vectors;

  explicit UltraRows(const Layer& layer) : layer(layer) {
    const int transform = *reinterpret_cast<const uint8_t*>(layer.params[Ultra::kTransform]);
    const auto place = [&](int j) { return Ultra::place(transform, j); };
    const __m128i places = _mm_setr_epi32(place(0), place(1), place(2), place(3));
    const __m128 sign = _mm_set1_ps(transform & 1 ? -0.0f : 0.0f);
    for (int k = 0; k < Ultra::kVectors; ++k) {
      const __m128 vector = _mm_loadu_ps(layer.params[Ultra::kCodebook] + 4 * k);
      _mm_store_ps(vectors.at[k], _mm_xor_ps(sign, _mm_permutevar_ps(vector, places)));
    }
  }
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
