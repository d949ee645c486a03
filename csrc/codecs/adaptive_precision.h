// 12, 6 or 2 bits a weight, by the importance of groups of 16 columns inside a window of a row.
//
//   tile      1 x window weights, n = window/16 groups
//   byte      0                ceil(n/4)
//           | class of groups | codes of group 0 | codes of group 1 | ...
//   Class of group g: bits 2g and 2g+1 of the map; 0, 1, 2 are 2, 6, 12 bits a code, so 4, 12, 24
//   bytes a group; code j is `bits` bits from bit bits*j of the group on.
//       w = fl32(fl32((2 code - top) * fl32(1 / top)) * scale[class]),  top = 2^bits - 1
//   Odd levels, symmetric about zero, the outermost at +-scale.
//   floor(high * n + 1/2) groups are of class 2, floor(middle * n + 1/2) of class 1, the others of
//   class 0; in a map that says otherwise, 3 reads as 2 and groups that would end past the tile are
//   zero.
//
// Params: scale (out, in/window, 3), the range of each class, sliced with the tiles.
#pragma once

#include "../codec.h"
#include "../hd.h"

namespace rs {

RS_TABLE int kAdaptiveBits[3] = {2, 6, 12};
RS_TABLE int kAdaptiveTop[3] = {3, 63, 4095};
RS_TABLE float kAdaptiveUnit[3] = {1.0f / 3, 1.0f / 63, 1.0f / 4095};
constexpr int kAdaptiveGroup = 16;

// How many groups of a window are of each class.
struct AdaptiveCounts {
  int64_t of[3];
  AdaptiveCounts(int64_t groups, double high, double middle);
  int64_t bytes() const;  // of a tile
};

struct AdaptivePrecision {
  static constexpr int kUnit = kAdaptiveGroup;

  struct Tables {
    const float* scale;
    int64_t tiles, groups, bytes;
    template <class L>
    RS_HD explicit Tables(const L& layer)
        : scale(layer.params[0]),
          tiles(layer.tile_cols()),
          groups(layer.tile.cols / kAdaptiveGroup),
          bytes(layer.tile.bytes) {}
  };
  static constexpr int kSums = 0;

  RS_HD static int kind(const uint8_t* tile, int64_t group) {
    const int stored = tile[group / 4] >> (2 * (group % 4)) & 3;
    return stored < 3 ? stored : 2;
  }
  RS_HD static int64_t size(int kind) { return 2 * kAdaptiveBits[kind]; }

  // Calls visit(j, level) for a group's weights, unless its codes would end past the tile.
  template <class Visit>
  RS_HD static void levels(const uint8_t* tile, int group, const Tables& t, Visit&& visit) {
    int64_t at = (t.groups + 3) / 4;
    for (int64_t g = 0; g < group; ++g) at += size(kind(tile, g));
    const int k = kind(tile, group), bits = kAdaptiveBits[k];
    if (at + size(k) > t.bytes) return;
    for (int j = 0; j < kAdaptiveGroup; ++j) {
      const uint8_t* byte = tile + at + bits * j / 8;
      const int shift = bits * j % 8;
      uint32_t code = byte[0];
      if (shift + bits > 8) code |= static_cast<uint32_t>(byte[1]) << 8;
      code = (code >> shift) & static_cast<uint32_t>(kAdaptiveTop[k]);
      const auto level = static_cast<float>(2 * static_cast<int>(code) - kAdaptiveTop[k]);
      visit(j, mul(level, kAdaptiveUnit[k]));
    }
  }

  RS_HD static void decode(const uint8_t* tile, int64_t row, int64_t col, int group,
                           const Tables& t, float* w) {
    const float scale = t.scale[(row * t.tiles + col) * 3 + kind(tile, group)];
    for (int j = 0; j < kAdaptiveGroup; ++j) w[j] = 0;
    levels(tile, group, t, [&](int j, float level) { w[j] = mul(level, scale); });
  }
  template <class Sums>
  RS_HD static void adjoint(const uint8_t* tile, int64_t row, int64_t col, int group,
                            const Tables& t, const float* dw, Sums& sums) {
    float sum = 0;
    levels(tile, group, t, [&](int j, float level) { sum += level * dw[j]; });
    sums.own(0, (row * t.tiles + col) * 3 + kind(tile, group), sum);
  }
};

// spec: adaptive_precision(window=128, high=0.25, middle=0.5)
std::vector<Term> adaptive_precision_terms(const Spec& spec, Shape shape);

}  // namespace rs
