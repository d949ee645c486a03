// decode and adjoint as loops over a codec's units. A codec is a struct with
//   kUnit                                    weights one call decodes, consecutive in the tile
//   Tables(layer)                            what is computed once per call
//   decode(tile, row, col, unit, tables, w)  tile coordinates choose the tile's own params
//   adjoint(tile, row, col, unit, tables, dw, sums)   the unit's terms of the params' gradients:
//                      sums.own(param, i, v) for an entry that only this tile uses,
//                      sums.shared(i, v) for sum i of kSums over all weights, |v| <= kGain max |dw|
//   fold(f, tables, sum, grads)     f < kFolds: adds to one entry of a shared param what the shared
//                      sums make of it; see codecs/trellis.h
// The loops of cuda/loops.cuh are over the same members.
// Every fast slot is tested against these.
#pragma once

#include <algorithm>
#include <memory>

#include "../codec.h"

namespace rs {

template <class Codec, class Visit>
void for_each_unit(const Layer& layer, int64_t row0, int64_t row1, Visit&& visit) {
  const auto [rows, cols, bytes] = layer.tile;
  for (int64_t tr = row0 / rows; tr < row1 / rows; ++tr) {
    for (int64_t tc = 0; tc < layer.tile_cols(); ++tc) {
      const uint8_t* tile = layer.codes + (tr * layer.tile_cols() + tc) * bytes;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; j += Codec::kUnit)
          visit(tile, tr, tc, static_cast<int>((i * cols + j) / Codec::kUnit),
                (tr * rows + i - row0) * layer.in + tc * cols + j);
    }
  }
}

template <class Codec>
void decode_loop(const Layer& layer, int64_t row0, int64_t row1, float* w) {
  const typename Codec::Tables tables(layer);
  for_each_unit<Codec>(layer, row0, row1,
                       [&](const uint8_t* tile, int64_t tr, int64_t tc, int unit, int64_t at) {
                         Codec::decode(tile, tr, tc, unit, tables, w + at);
                       });
}

// Shared sums have as many terms as the row range has weights, hence float64.
struct Sums {
  double* sum;
  float* const* grads;

  void shared(int64_t i, float v) { sum[i] += v; }
  void own(int param, int64_t i, float v) {
    if (grads[param]) grads[param][i] += v;
  }
};

template <class Codec>
void adjoint_loop(const Layer& layer, int64_t row0, int64_t row1, const float* dw,
                  float* const* grads) {
  const typename Codec::Tables tables(layer);
  const auto sum = std::make_unique<double[]>(Codec::kSums);
  Sums sums{sum.get(), grads};
  for_each_unit<Codec>(layer, row0, row1,
                       [&](const uint8_t* tile, int64_t tr, int64_t tc, int unit, int64_t at) {
                         Codec::adjoint(tile, tr, tc, unit, tables, dw + at, sums);
                       });
  if constexpr (Codec::kSums > 0)
    for (int f = 0; f < Codec::kFolds; ++f) Codec::fold(f, tables, sum.get(), grads);
}

}  // namespace rs
