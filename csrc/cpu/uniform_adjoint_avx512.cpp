// Gradients of uniform's scales and zeros on AVX-512 (BW, VBMI), groups of a multiple of 32: codes
// as in decode, their products with the gradient of the weights summed in lanes.
#include "fast.h"

#if RS_FAST_X86
#include "../codecs/uniform.h"
#include "uniform_unpack.h"

#include "avx512.h"

namespace rs {
namespace {

template <int Bits>
void sum_groups(const Layer& layer, bool symmetric, int64_t row0, int64_t row1, const float* dw,
                float* dscale, float* dzero) {
  constexpr int kBytes = 4 * Bits;  // of 32 codes
  const auto& [bytes, shift] = kUnpack<Bits>;
  const __m512i top = _mm512_set1_epi32((1 << Bits) - 1);
  const int64_t n = layer.tile_cols();
  const uint8_t* codes = layer.codes + row0 * n * layer.tile.bytes;
  for (int64_t tile = row0 * n; tile < row1 * n; ++tile) {
    const __m512 zero = _mm512_set1_ps(symmetric ? 1 << (Bits - 1) : layer.params[1][tile]);
    __m512 level[2] = {}, all[2] = {};
    for (int64_t j = 0; j < layer.tile.cols; j += 32, codes += kBytes, dw += 32) {
      const __m512i c =
          _mm512_castsi256_si512(_mm256_maskz_loadu_epi8((1ull << kBytes) - 1, codes));
      for (int i = 0; i < 2; ++i) {
        const __m512i pair = _mm512_permutexvar_epi8(load(bytes[i].at), c);
        const __m512i code = _mm512_and_si512(_mm512_srlv_epi32(pair, load(shift.at)), top);
        const __m512 d = _mm512_loadu_ps(dw + 16 * i);
        level[i] = _mm512_fmadd_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(code), zero), d, level[i]);
        all[i] = _mm512_add_ps(all[i], d);
      }
    }
    if (dscale) dscale[tile] += _mm512_reduce_add_ps(_mm512_add_ps(level[0], level[1]));
    if (dzero)
      dzero[tile] -= layer.params[0][tile] * _mm512_reduce_add_ps(_mm512_add_ps(all[0], all[1]));
  }
}

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {
namespace {

template <int Bits, bool Symmetric>
void adjoint(const Layer& layer, int64_t row0, int64_t row1, const float* dw, float* const* grads) {
  sum_groups<Bits>(layer, Symmetric, row0, row1, dw, grads[0], Symmetric ? nullptr : grads[1]);
}

}  // namespace

void uniform_adjoint_avx512_slots(Row& row, int bits, bool symmetric, int64_t group) {
  if (group % 32 != 0) return;
  with_uniform(bits, symmetric,
               [&]<int Bits, bool Symmetric> { row.adjoint = adjoint<Bits, Symmetric>; });
}

}  // namespace rs
#endif
