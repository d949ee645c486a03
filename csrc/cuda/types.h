// What the torch side and the kernels share: storage types, a term's data on the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../codec.h"
#include "../hd.h"

namespace rs::cuda {

enum class Type { float32, float16, bfloat16 };

constexpr int kMostParams = 4;
constexpr int kCodesAlignment = 16;  // bytes, of a layer's first tile

// rs::Layer as kernels take it, by value. `tables` is what the row's `prepare` wrote.
struct LayerView {
  int64_t out, in;
  Tile tile;
  const uint8_t* codes;
  const float* params[kMostParams];
  void* tables;

  RS_HD int64_t tile_rows() const { return out / tile.rows; }
  RS_HD int64_t tile_cols() const { return in / tile.cols; }
};

// Tiles [row0, row1) x [col0, col1) of T.
struct TileRange {
  int64_t row0, row1, col0, col1;
};

}  // namespace rs::cuda
