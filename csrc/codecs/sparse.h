// The largest weights of each row, as int8 against one scale per row; all others are zero.
//
//   tile      1 x in weights (one row); with n = round(percent/100 * in), at least 1:
//   byte      0       2          2+2n
//             | count | column[n] | value[n] |      count and columns uint16, values int8
//   Columns rise; entries from `count` on are zero.   w[column] = fl32(value * scale)
//
// Params: scale (out).
#pragma once

#include "../codec.h"
#include "../hd.h"

namespace rs {

// One row's entries. Reading is safe for any bytes: the count is cut to what the tile holds and a
// column past the row is skipped.
struct SparseEntries {
  const uint8_t* tile;
  int64_t capacity, in;

  template <class L>
  RS_HD SparseEntries(const L& layer, int64_t row)
      : tile(layer.codes + row * layer.tile.bytes),
        capacity((layer.tile.bytes - 2) / 3),
        in(layer.in) {}
  RS_HD int64_t stored_count() const { return tile[0] | tile[1] << 8; }
  RS_HD int64_t count() const { return stored_count() < capacity ? stored_count() : capacity; }
  RS_HD int64_t column(int64_t i) const { return tile[2 + 2 * i] | tile[3 + 2 * i] << 8; }
  RS_HD float value(int64_t i) const {
    return static_cast<float>(static_cast<int8_t>(tile[2 + 2 * capacity + i]));
  }
  // Calls visit(column, value) for every step-th entry from `first` on.
  template <class Visit>
  RS_HD void each(int64_t first, int64_t step, Visit&& visit) const {
    const int64_t n = count();
    for (int64_t i = first; i < n; i += step)
      if (column(i) < in) visit(column(i), value(i));
  }
};

// spec: sparse(percent=1)
std::vector<Term> sparse_terms(const Spec& spec, Shape shape);

}  // namespace rs
