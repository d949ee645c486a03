// Vectors of `block` weights: one of 16 prototypes seen through one of four transforms.
//
//   tile      1 x 4*block weights in 3 bytes: four codes of 6 bits, the first in bits 5..0
//   code      | negate 5 | roll 4 | prototype 3..0 |
//   vector    p = prototypes[prototype]
//             roll: w_j = p_((j - block/4) mod block), else w_j = p_j;   negate: -w_j
//
// 6 / block bits a weight. Params: prototypes (16, block), shared; out_scale (out), the frame.
#pragma once

#include "../codec.h"
#include "../hd.h"

namespace rs {

constexpr int kPrototypes = 16, kVqCodes = 64;
constexpr int kVqLargestBlock = 256;

// Code of vector v of a tile.
RS_HD uint32_t vq_code(const uint8_t* tile, int v) {
  return read_bits<6>(tile, static_cast<int64_t>(v) * 6);
}

// Where weight j of a code's vector comes from: an index into prototypes, and its sign.
RS_HD int vq_source(uint32_t code, int j, int block) {
  const int from = code & 16 ? j - block / 4 : j;
  return static_cast<int>(code & 15) * block + (from < 0 ? from + block : from);
}
RS_HD bool vq_negative(uint32_t code) { return code & 32; }

struct VqCyclic {
  static constexpr int kUnit = 4;  // weights; a vector is one or more units
  enum Param { kPrototypeValues, kOutScale };

  struct Tables {
    const float* prototypes;
    int block;
    template <class L>
    RS_HD explicit Tables(const L& layer)
        : prototypes(layer.params[kPrototypeValues]),
          block(static_cast<int>(layer.tile.cols / 4)) {}
  };
  // Shared sums: the gradient of the prototypes, 16 * block of them.
  static constexpr int kSums = kPrototypes * kVqLargestBlock, kGain = 1, kFolds = kSums;
  RS_HD static void fold(int i, const Tables& t, const double* sum, float* const* grads) {
    if (i < kPrototypes * t.block && grads[kPrototypeValues])
      grads[kPrototypeValues][i] += static_cast<float>(sum[i]);
  }

  RS_HD static void decode(const uint8_t* tile, int64_t, int64_t, int unit, const Tables& t,
                           float* w) {
    const uint32_t code = vq_code(tile, unit * kUnit / t.block);
    for (int k = 0; k < kUnit; ++k) {
      const float value = t.prototypes[vq_source(code, unit * kUnit % t.block + k, t.block)];
      w[k] = vq_negative(code) ? -value : value;
    }
  }
  template <class Sums>
  RS_HD static void adjoint(const uint8_t* tile, int64_t, int64_t, int unit, const Tables& t,
                            const float* dw, Sums& sums) {
    const uint32_t code = vq_code(tile, unit * kUnit / t.block);
    for (int k = 0; k < kUnit; ++k)
      sums.shared(vq_source(code, unit * kUnit % t.block + k, t.block),
                  vq_negative(code) ? -dw[k] : dw[k]);
  }
};

// spec: vq_cyclic(block=4)
std::vector<Term> vq_cyclic_terms(const Spec& spec, Shape shape);

}  // namespace rs
