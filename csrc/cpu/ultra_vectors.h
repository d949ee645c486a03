// The codebook of ultra as the layer sees it. Included behind a `#pragma GCC target` with AVX, so
// internal to its file.
#pragma once

namespace rs {
namespace {

RS_INLINE void ultra_vectors(const Layer& layer, float (*to)[4]) {
  const int transform = *reinterpret_cast<const uint8_t*>(layer.params[Ultra::kTransform]);
  const auto place = [&](int j) { return Ultra::place(transform, j); };
  const __m128i places = _mm_setr_epi32(place(0), place(1), place(2), place(3));
  const __m128 sign = _mm_set1_ps(transform & 1 ? -0.0f : 0.0f);
  for (int k = 0; k < Ultra::kVectors; ++k) {
    const __m128 from = _mm_loadu_ps(layer.params[Ultra::kCodebook] + 4 * k);
    _mm_store_ps(to[k], _mm_xor_ps(sign, _mm_permutevar_ps(from, places)));
  }
}

}  // namespace
}  // namespace rs
