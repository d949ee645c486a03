// Blocks of which only some weights are kept, as int8 or as one cosine.
//
//   layout=square   tile 4 x 4, four weights kept; bit 4i+j of a mask is row i, column j
//     byte     0         1          2          3          4
//            | pattern | value[0] | value[1] | value[2] | value[3] |      2.5 bits per weight
//     mask16=True stores the mask (uint16, at most four ones) in place of its number: 3 bits
//     The n-th one from the least significant bit on carries value[n]:
//       w = fl32(value * value_scale), 0 elsewhere.  Of more than four ones the first four count.
//   layout=row      tile 1 x 8
//     byte     0      1      2
//            | mask | base | phase |                                      3 bits per weight
//       w_j = mask bit j ? fl32(fl32(base * value_scale) * cos(2 pi (phase/256 + j/8))) : 0
//
// Params: value_scale (1), shared, in place of the documents' 1/127, so that rows of unit mean
// square use the whole range; masks (256, 2) uint8, little-endian, shared, only for pattern
// numbers; out_scale (out), the frame.
#pragma once

#include <bit>

#include "../codec.h"
#include "../hd.h"
#include "../trig.h"

namespace rs {

// The mask with all but its four lowest ones cleared.
RS_HD uint32_t first_four(uint32_t mask) {
  uint32_t rest = mask;
  for (int i = 0; i < 4; ++i) rest &= rest - 1;
  return mask ^ rest;
}

// The only shared sum: the gradient of value_scale.
struct BlockSparseSums {
  static constexpr int kSums = 1, kGain = 1024, kFolds = 1;
  template <class Tables>
  RS_HD static void fold(int, const Tables&, const double* sum, float* const* grads) {
    if (grads[0]) grads[0][0] += static_cast<float>(*sum);
  }
};

template <bool Mask16>
struct SquareSparse : BlockSparseSums {
  static constexpr int kUnit = 4;  // a row of the tile
  static constexpr int kBytes = Mask16 ? 6 : 5, kValues = kBytes - 4;
  enum Param { kScale, kMasks };

  struct Tables {
    float scale;
    uint16_t masks[Mask16 ? 1 : 256];
    template <class L>
    RS_HD explicit Tables(const L& layer) : scale(*layer.params[kScale]) {
      if constexpr (!Mask16) {
        for (int i = 0; i < 256; ++i) masks[i] = pattern(layer.params[kMasks], i);
      }
    }
    RS_HD static uint16_t pattern(const float* param, int i) {
      const auto* bytes = reinterpret_cast<const uint8_t*>(param) + 2 * i;
      return static_cast<uint16_t>(first_four(static_cast<uint32_t>(bytes[0] | bytes[1] << 8)));
    }
  };

  RS_HD static uint32_t mask(const uint8_t* tile, const Tables& t) {
    if constexpr (Mask16) return first_four(static_cast<uint32_t>(tile[0] | tile[1] << 8));
    return t.masks[tile[0]];
  }
  RS_HD static float value(const uint8_t* tile, int n) {
    return static_cast<float>(static_cast<int8_t>(tile[kValues + n]));
  }
  // Calls visit(j, value) for the kept columns of row i.
  template <class Visit>
  RS_HD static void row(const uint8_t* tile, int i, const Tables& t, Visit&& visit) {
    const uint32_t all = mask(tile, t);
    int n = std::popcount(all & ((1u << (4 * i)) - 1));
    for (int j = 0; j < 4; ++j)
      if (all >> (4 * i + j) & 1) visit(j, value(tile, n++));
  }
  RS_HD static void decode(const uint8_t* tile, int64_t, int64_t, int i, const Tables& t,
                           float* w) {
    for (int j = 0; j < 4; ++j) w[j] = 0;
    row(tile, i, t, [&](int j, float v) { w[j] = mul(v, t.scale); });
  }
  template <class Sums>
  RS_HD static void adjoint(const uint8_t* tile, int64_t, int64_t, int i, const Tables& t,
                            const float* dw, Sums& sums) {
    row(tile, i, t, [&](int j, float v) { sums.shared(0, v * dw[j]); });
  }
};

struct RowSparse : BlockSparseSums {
  static constexpr int kUnit = 8;

  // cosine[phase][j] = cos(2 pi (phase/256 + j/8))
  struct Cosines {
    float at[256][8];
    Cosines() {
      for (int phase = 0; phase < 256; ++phase)
        for (int j = 0; j < 8; ++j) at[phase][j] = of(phase, j);
    }
    RS_HD static float of(int phase, int j) {
      return static_cast<float>(turn_cosine(static_cast<uint64_t>(phase + 32 * j), 256));
    }
    static const Cosines& get() {
      static const Cosines table;
      return table;
    }
  };
  struct Tables {
    float scale;
    const Cosines& cosine;
    explicit Tables(const Layer& layer) : scale(*layer.params[0]), cosine(Cosines::get()) {}
  };

  RS_HD static float base(const uint8_t* tile) {
    return static_cast<float>(static_cast<int8_t>(tile[1]));
  }
  template <class T>
  RS_HD static void decode(const uint8_t* tile, int64_t, int64_t, int, const T& t, float* w) {
    const float size = mul(base(tile), t.scale);
    for (int j = 0; j < 8; ++j) w[j] = tile[0] >> j & 1 ? mul(size, t.cosine.at[tile[2]][j]) : 0.0f;
  }
  template <class T, class Sums>
  RS_HD static void adjoint(const uint8_t* tile, int64_t, int64_t, int, const T& t, const float* dw,
                            Sums& sums) {
    float sum = 0;
    for (int j = 0; j < 8; ++j)
      if (tile[0] >> j & 1) sum += t.cosine.at[tile[2]][j] * dw[j];
    sums.shared(0, base(tile) * sum);
  }
};

// spec: block_sparse(layout=square|row, mask16=False)
std::vector<Term> block_sparse_terms(const Spec& spec, Shape shape);

}  // namespace rs
