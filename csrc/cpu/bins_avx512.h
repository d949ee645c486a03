// Sums of values by a number below Entries, 16 at a time: each lane sums for itself in registers.
// Included behind avx512.h, so internal to its file.
#pragma once

namespace rs {
namespace {

template <int Entries>
struct Bins {
  __m512 sum[Entries];

  RS_INLINE Bins() { clear(); }
  RS_INLINE void clear() {
    for (__m512& lanes : sum) lanes = _mm512_setzero_ps();
  }
  // Lanes outside `mask` and numbers from Entries on add nothing.
  RS_INLINE void add(__m512i number, __m512 value, __mmask16 mask) {
#pragma GCC unroll 16
    for (int e = 0; e < Entries; ++e)
      sum[e] = _mm512_mask_add_ps(
          sum[e], _mm512_mask_cmpeq_epi32_mask(mask, number, _mm512_set1_epi32(e)), sum[e], value);
  }
  // Adds the sums to total[Entries] and starts over: short sums in float32, long ones in float64.
  RS_INLINE void drain(double* total) {
    for (int e = 0; e < Entries; ++e)
      total[e] +=
          _mm512_reduce_add_pd(_mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(sum[e])),
                                             _mm512_cvtps_pd(_mm512_extractf32x8_ps(sum[e], 1))));
    clear();
  }
};

}  // namespace
}  // namespace rs
