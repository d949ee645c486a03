// Fast slots of block_sparse.
#pragma once

#include <algorithm>
#include <bit>
#include <vector>

#include "../codecs/block_sparse.h"
#include "fast.h"
#include "integers.h"

namespace rs {

// Which value goes to each of the eight weights of two rows; 4 for none.
struct alignas(8) Places {
  int8_t at[8];
};
constexpr Places places_of(uint32_t bits, int first) {
  Places p{};
  for (int j = 0; j < 8; ++j)
    p.at[j] = static_cast<int8_t>(bits >> j & 1 && first < 4 ? first++ : 4);
  return p;
}

struct PatternPlaces {
  static constexpr int kBytes = 5, kValues = 1;
  Places places[256][2];

  explicit PatternPlaces(const Layer& layer) {
    const SquareSparse<false>::Tables tables(layer);
    for (int i = 0; i < 256; ++i) {
      const uint32_t mask = tables.masks[i], low = mask & 255;
      places[i][0] = places_of(low, 0);
      places[i][1] = places_of(mask >> 8, std::popcount(low));
    }
  }
  const Places& of(const uint8_t* tile, int half) const { return places[tile[0]][half]; }
};

struct MaskTable {
  Places places[5][256]{};  // by the ones before the byte, up to four
  uint8_t ones[256]{};
  constexpr MaskTable() {
    for (uint32_t bits = 0; bits < 256; ++bits) {
      ones[bits] = static_cast<uint8_t>(std::min(std::popcount(bits), 4));
      for (int before = 0; before < 5; ++before) places[before][bits] = places_of(bits, before);
    }
  }
};
inline constexpr MaskTable kMaskTable;

struct MaskPlaces {
  static constexpr int kBytes = 6, kValues = 2;
  explicit MaskPlaces(const Layer&) {}
  const Places& of(const uint8_t* tile, int half) const {
    return half ? kMaskTable.places[kMaskTable.ones[tile[0]]][tile[1]]
                : kMaskTable.places[0][tile[0]];
  }
};

// A 1 x 8 tile's cosines by its phase, and what they are times by its base.
struct CosineTables {
  const float (*cosines)[8];
  float sizes[256];

  explicit CosineTables(const Layer& layer) {
    const RowSparse::Tables tables(layer);
    cosines = tables.cosine.at;
    for (int base = 0; base < 256; ++base)
      sizes[base] = quiet(static_cast<float>(static_cast<int8_t>(base)) * tables.scale);
  }
};

// Sum of a[i] * b[i] in float64.
double wide_dot(const float* a, const float* b, int64_t n);

// Gradient of the scale: the weights of a scale of one, met by dw[(row1-row0) * in].
template <void (*Decode)(const Layer&, int64_t, int64_t, float*)>
void block_sparse_adjoint(const Layer& layer, int64_t row0, int64_t row1, const float* dw,
                          float* const* grads) {
  if (!grads[0]) return;
  const float one = 1.0f;
  Layer unscaled = layer;
  unscaled.params[0] = &one;
  const int64_t band = layer.tile.rows * layer.in;
  const int64_t step = std::max<int64_t>(1, (int64_t{1} << 15) / band) * layer.tile.rows;
  std::vector<float> w(static_cast<size_t>(std::min(step, row1 - row0) * layer.in));
  double sum = 0;
  for (int64_t r = row0; r < row1; r += step) {
    const int64_t end = std::min(r + step, row1);
    Decode(unscaled, r, end, w.data());
    sum += wide_dot(w.data(), dw + (r - row0) * layer.in, (end - r) * layer.in);
  }
  grads[0][0] += static_cast<float>(sum);
}

void block_sparse_avx2_slots(Row& row, bool square, bool mask16);
void block_sparse_avx512_slots(Row& row, bool square, bool mask16);

inline void block_sparse_fast_slots(Row& row, bool square, bool mask16, Isa isa) {
#if RS_FAST_X86
  if (isa >= Isa::avx2) block_sparse_avx2_slots(row, square, mask16);
  if (isa >= Isa::avx512) block_sparse_avx512_slots(row, square, mask16);
#endif
}

}  // namespace rs
