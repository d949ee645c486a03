// Encoding tiles of one row each: stretches of tiles that lie side by side, with their importance.
#pragma once

#include <algorithm>
#include <vector>

#include "../codec.h"

namespace rs {

// Calls visit(tile, count, w, h) for the stretches of tiles [tile0, tile1) that share a row:
// `count` tiles from `tile` on, their weights w and the importance h of the same columns (ones for
// null).
template <class Visit>
void for_each_strip(const Layer& layer, const float* w, const EncodeOptions& options, int64_t tile0,
                    int64_t tile1, Visit&& visit) {
  const int64_t across = layer.tile_cols(), cols = layer.tile.cols;
  std::vector<float> ones;
  if (!options.importance)
    ones.assign(static_cast<size_t>(std::min(across, tile1 - tile0) * cols), 1.0f);
  for (int64_t tile = tile0; tile < tile1;) {
    const int64_t col = tile % across, count = std::min(across - col, tile1 - tile);
    visit(tile, count, w + tile / across * layer.in + col * cols,
          options.importance ? options.importance + col * cols : ones.data());
    tile += count;
  }
}

}  // namespace rs
