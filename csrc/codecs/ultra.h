// Vectors of four weights from a codebook of 1024, which all layers of a model may share, seen
// through one transform per layer, and the largest errors as a sparse second term.
//
//   tile      1 x 16 weights, 5 bytes: index i is bits 10i to 10i+9, least significant first
//   transform bit 2: the halves of the vector change places, then bit 1: its order turns round,
//   then
//             bit 0: its sign changes
//   w[4i+j] = +-codebook[index[i]][order[j]]
//
// Params: codebook (1024, 4), transform (1) uint8 below 8, both shared; out_scale (out), the frame.
// The second term is `sparse`, its params prefixed with rest_; percent=0 leaves it out.
#pragma once

#include "../codec.h"
#include "../hd.h"

namespace rs {

struct Ultra {
  static constexpr int kUnit = 4, kVectors = 1024;
  enum Param { kCodebook, kTransform, kOutScale };

  // Entry of the codebook's vector that is weight j.
  RS_HD static int place(int transform, int j) {
    if (transform & 2) j = 3 - j;
    return transform & 4 ? (j + 2) & 3 : j;
  }

  struct Tables {
    int transform;
    float vector[kVectors][4];  // as the layer sees them

    explicit Tables(const Layer& layer)
        : transform(*reinterpret_cast<const uint8_t*>(layer.params[kTransform])) {
      for (int k = 0; k < kVectors; ++k) fill(layer.params[kCodebook], k);
    }
    RS_HD void fill(const float* codebook, int k) {
      for (int j = 0; j < 4; ++j) {
        const float value = codebook[4 * k + place(transform, j)];
        vector[k][j] = transform & 1 ? -value : value;
      }
    }
  };

  RS_HD static int index(const uint8_t* tile, int i) {
    return (tile[i] | tile[i + 1] << 8) >> (2 * i) & 1023;
  }
  RS_HD static void decode(const uint8_t* tile, int64_t, int64_t, int i, const Tables& t,
                           float* w) {
    for (int j = 0; j < 4; ++j) w[j] = t.vector[index(tile, i)][j];
  }

  // Shared sums: the gradient of the vectors as the layer sees them.
  static constexpr int kSums = 4 * kVectors, kGain = 1, kFolds = kSums;
  template <class Sums>
  RS_HD static void adjoint(const uint8_t* tile, int64_t, int64_t, int i, const Tables&,
                            const float* dw, Sums& sums) {
    for (int j = 0; j < 4; ++j) sums.shared(4 * index(tile, i) + j, dw[j]);
  }
  RS_HD static void fold(int f, const Tables& t, const double* sum, float* const* grads) {
    if (!grads[kCodebook]) return;
    const auto value = static_cast<float>(sum[f]);
    grads[kCodebook][(f & ~3) + place(t.transform, f & 3)] += t.transform & 1 ? -value : value;
  }
};

// spec: ultra(codebook=layer|model, percent=1)
std::vector<Term> ultra_terms(const Spec& spec, Shape shape);

}  // namespace rs
