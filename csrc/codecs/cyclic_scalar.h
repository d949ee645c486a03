// One cyclic code per weight, one scale per group of a row.
//
//   tile      1 x group weights, a code of 8 or 16 bits each, little-endian
//   8 bits    family[7:6] diff[5:4] phase[3:0]
//             w = fl32(L[code] * fl32(scale * fl32(1/127)))          L: cyclic_tables.h
//   16 bits   amp[15:10] diff[9:8] phase[7:4] micro[3:0]
//             w = fl32(fl32(C[(16 phase + micro + 64 diff) mod 256] * (amp + 1) / 64) * scale)
//             C[k] = fl32(cos(2 pi k / 256)), (amp + 1) / 64 is exact
//
// Params: scale (out, in/group), sliced with the tiles.
#pragma once

#include "../codec.h"
#include "../hd.h"
#include "cyclic_tables.h"

namespace rs {

template <int Bits>
struct CyclicScalar;

template <>
struct CyclicScalar<8> {
  static constexpr int kCodes = 256;
  // What a code is times, computed once per group.
  RS_HD static float step(float scale) { return mul(scale, 1.0f / 127); }
  RS_HD static float level(uint32_t code, const float*) {
    return static_cast<float>(kCyclicScalar[code >> 6][code >> 4 & 3][code & 15]);
  }
  static constexpr float kLevelUnit = 1.0f / 127;  // dw / dscale = level * unit
};

template <>
struct CyclicScalar<16> {
  static constexpr int kCodes = 65536;
  RS_HD static float step(float scale) { return scale; }
  RS_HD static float level(uint32_t code, const float* cosine) {
    const float amp = static_cast<float>((code >> 10) + 1);
    return mul(cosine[(code + (code >> 2 & 0xC0)) & 255], mul(amp, 1.0f / 64));
  }
  static constexpr float kLevelUnit = 1.0f;
};

// C[256], the same on every device.
const float* cyclic_cosines();

// spec: cyclic_scalar(bits=8, group=64)
std::vector<Term> cyclic_scalar_terms(const Spec& spec, Shape shape);

}  // namespace rs
