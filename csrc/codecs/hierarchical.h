// Eight weights share a 16-bit base; two bits each say how they differ from it. 4 bits a weight.
//
//   tile      1 x 8 weights in 4 bytes
//   byte      0      2
//             | base | deltas |      uint16 each, little-endian; delta i in bits 2i+1..2i
//
//   mode=mul  w_i = fl32(int16(base) / 512 * multipliers[delta_i])
//   mode=xor  code = base ^ mask[delta_i],  mask = 0, 0x00F0, 0x0F00, 0x00FF
//             15   12 11  10 9   4 3   0
//             | phase | diff | amp | idx |
//             w_i = fl32(T[(phase + 4 diff) mod 16] * (amp + 1) / 8192 * levels[idx])
//             T[p] = round(127 cos(2 pi p / 16))
//
// 512: with rows of unit mean square a base reaches 64 of them in steps far below what two bits can
// tell. Both factors left of the last product are exact in float32.
//
// Params: multipliers (4) or levels (16), shared; out_scale (out), the frame.
#pragma once

#include "../codec.h"
#include "../hd.h"
#include "cyclic_tables.h"

namespace rs {

constexpr int kHierarchicalBlock = 8;
constexpr int kXorLevels = 16;

struct HierarchicalTile {
  uint32_t base, deltas;

  RS_HD explicit HierarchicalTile(const uint8_t* tile)
      : base(tile[0] | static_cast<uint32_t>(tile[1]) << 8),
        deltas(tile[2] | static_cast<uint32_t>(tile[3]) << 8) {}
  RS_HD uint32_t delta(int i) const { return (deltas >> (2 * i)) & 3; }
};

struct MulMode {
  static constexpr int kEntries = 4, kGain = 64;

  RS_HD static float factor(uint32_t base, uint32_t) {
    return static_cast<float>(static_cast<int16_t>(base)) * (1.0f / 512);
  }
  RS_HD static int entry(uint32_t, uint32_t delta) { return static_cast<int>(delta); }
};

struct XorMode {
  static constexpr int kEntries = kXorLevels, kGain = 1;

  RS_HD static uint32_t code(uint32_t base, uint32_t delta) {
    return base ^ (delta == 0 ? 0u : delta == 1 ? 0x00F0u : delta == 2 ? 0x0F00u : 0x00FFu);
  }
  RS_HD static float factor(uint32_t base, uint32_t delta) {
    const uint32_t c = code(base, delta);
    const int amp = static_cast<int>((c >> 4) & 63) + 1;
    return static_cast<float>(kCyclic[0][((c >> 12) + ((c >> 10) & 3) * 4) & 15] * amp) *
           (1.0f / 8192);
  }
  RS_HD static int entry(uint32_t base, uint32_t delta) {
    return static_cast<int>(code(base, delta) & 15);
  }
};

template <class Mode>
struct Hierarchical {
  static constexpr int kUnit = kHierarchicalBlock;
  enum Param { kTable, kOutScale };

  struct Tables {
    const float* table;
    template <class L>
    RS_HD explicit Tables(const L& layer) : table(layer.params[kTable]) {}
  };
  // Shared sums: the gradient of the table.
  static constexpr int kSums = Mode::kEntries, kGain = Mode::kGain, kFolds = kSums;
  RS_HD static void fold(int i, const Tables&, const double* sum, float* const* grads) {
    if (grads[kTable]) grads[kTable][i] += static_cast<float>(sum[i]);
  }

  RS_HD static void decode(const uint8_t* bytes, int64_t, int64_t, int, const Tables& t, float* w) {
    const HierarchicalTile tile(bytes);
    for (int i = 0; i < kUnit; ++i)
      w[i] = mul(Mode::factor(tile.base, tile.delta(i)),
                 t.table[Mode::entry(tile.base, tile.delta(i))]);
  }
  template <class Sums>
  RS_HD static void adjoint(const uint8_t* bytes, int64_t, int64_t, int, const Tables&,
                            const float* dw, Sums& sums) {
    const HierarchicalTile tile(bytes);
    for (int i = 0; i < kUnit; ++i)
      sums.shared(Mode::entry(tile.base, tile.delta(i)),
                  Mode::factor(tile.base, tile.delta(i)) * dw[i]);
  }
};

// spec: hierarchical(mode=mul|xor, fitted=True)
std::vector<Term> hierarchical_terms(const Spec& spec, Shape shape);

}  // namespace rs
