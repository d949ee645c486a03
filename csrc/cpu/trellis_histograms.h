// Sums of the trellis's table gradient: groups of 32 states leave an address and a signed pair of
// gradients each, which are then added one by one to histograms of the table's 1024 points.
// Neighbouring states take turns among the histograms, so that an addition seldom waits for the one
// before it.
#pragma once

#include <emmintrin.h>

#include <memory>

#include "../codecs/trellis.h"
#include "clones.h"

namespace rs {

constexpr int kHistograms = 2;

// du, dv of a table's point side by side.
struct Histograms {
  alignas(64) float at[kHistograms][1024][2] = {};
};

// 32 states: where in a histogram, in bytes, and what to add.
template <class Offset>
struct alignas(64) Additions {
  Offset offset[32];
  float pair[32][2];
};

RS_INLINE void add_pair(Histograms& sums, int histogram, uint32_t offset, const float* pair) {
  auto* at = reinterpret_cast<__m128i*>(reinterpret_cast<char*>(sums.at[histogram]) + offset);
  const __m128 sum =
      _mm_add_ps(_mm_castsi128_ps(_mm_loadl_epi64(at)),
                 _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(pair))));
  _mm_storel_epi64(at, _mm_castps_si128(sum));
}

template <class Offset>
RS_INLINE void add_group(const Additions<Offset>& additions, Histograms& sums) {
#pragma GCC unroll 4
  for (int n = 0; n < 32; ++n)
    add_pair(sums, n % kHistograms, additions.offset[n], additions.pair[n]);
}

// The adjoint slot, from sums that `add_tiles` makes.
template <int K, auto add_tiles>
void histogram_adjoint(const Layer& layer, int64_t row0, int64_t row1, const float* dw,
                       float* const* grads) {
  const auto sums = std::make_unique<Histograms>();
  add_tiles(layer, row0, row1, dw, *sums);
  double all[Trellis<K>::kSums] = {};
  for (const auto& histogram : sums->at)
    for (int i = 0; i < 1024; ++i) all[i] += histogram[i][0], all[1024 + i] += histogram[i][1];
  const typename Trellis<K>::Tables tables(layer);
  for (int f = 0; f < Trellis<K>::kFolds; ++f) Trellis<K>::fold(f, tables, all, grads);
}

}  // namespace rs
