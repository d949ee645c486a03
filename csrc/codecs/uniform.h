// Integers of 2 to 8 bits, one scale per group of a row: the honest baseline.
//
//   tile      1 x group weights; code j is Bits bits from bit Bits*j on, least significant first;
//             the row group is padded to a byte with zero bits
//   symmetric      w = fl32((code - 2^(Bits-1)) * scale)
//   asymmetric     w = fl32(fl32(code - zero) * scale)
//
// Params: scale (out, in/group); zero (out, in/group) when symmetric=False. Both sliced with the
// tiles.
#pragma once

#include "../codec.h"
#include "../hd.h"

namespace rs {

template <int Bits, bool Symmetric>
struct Uniform {
  static constexpr int kUnit = 1;
  static constexpr int kHalf = 1 << (Bits - 1), kTop = (1 << Bits) - 1;
  enum Param { kScale, kZero };

  struct Tables {
    const float *scale, *zero;
    int64_t groups;
    template <class L>
    RS_HD explicit Tables(const L& layer)
        : scale(layer.params[kScale]),
          zero(Symmetric ? nullptr : layer.params[kZero]),
          groups(layer.tile_cols()) {}
  };
  static constexpr int kSums = 0;

  // Code relative to its zero.
  RS_HD static float level(const uint8_t* tile, int64_t group, int j, const Tables& t) {
    const float code = static_cast<float>(read_bits<Bits>(tile, static_cast<int64_t>(j) * Bits));
    if constexpr (Symmetric) return code - kHalf;
    return add(code, -t.zero[group]);
  }
  RS_HD static void decode(const uint8_t* tile, int64_t row, int64_t col, int j, const Tables& t,
                           float* w) {
    const int64_t group = row * t.groups + col;
    *w = mul(level(tile, group, j, t), t.scale[group]);
  }
  template <class Sums>
  RS_HD static void adjoint(const uint8_t* tile, int64_t row, int64_t col, int j, const Tables& t,
                            const float* dw, Sums& sums) {
    const int64_t group = row * t.groups + col;
    sums.own(kScale, group, level(tile, group, j, t) * *dw);
    if constexpr (!Symmetric) sums.own(kZero, group, -t.scale[group] * *dw);
  }
};

// Calls visit.template operator()<Bits, Symmetric>() for the setting.
template <int Bits = 2, class Visit>
void with_uniform(int bits, bool symmetric, Visit&& visit) {
  if (bits == Bits)
    return symmetric ? visit.template operator()<Bits, true>()
                     : visit.template operator()<Bits, false>();
  if constexpr (Bits < 8) with_uniform<Bits + 1>(bits, symmetric, visit);
}

// spec: uniform(bits=4, group=64, symmetric=False)
std::vector<Term> uniform_terms(const Spec& spec, Shape shape);

}  // namespace rs
