// decode and adjoint as loops over a codec's units. A codec is a struct with
//   kUnit                                    weights one call decodes, consecutive in the tile
//   Tables(layer)                            what is computed once per call
//   decode(tile, row, col, unit, tables, w)  tile coordinates choose the tile's own params
//   adjoint(..., dw, grad, grads), Grad      see codecs/trellis.h for a codec that uses all of it
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

template <class Codec>
void adjoint_loop(const Layer& layer, int64_t row0, int64_t row1, const float* dw,
                  float* const* grads) {
  const typename Codec::Tables tables(layer);
  auto grad = std::make_unique<typename Codec::Grad>();
  for_each_unit<Codec>(layer, row0, row1,
                       [&](const uint8_t* tile, int64_t tr, int64_t tc, int unit, int64_t at) {
                         Codec::adjoint(tile, tr, tc, unit, tables, dw + at, *grad, grads);
                       });
  grad->finish(tables, grads);
}

}  // namespace rs
