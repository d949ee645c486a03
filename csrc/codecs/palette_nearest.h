// The nearest entry of a codebook: the same choice on every device.
#pragma once

#include <cstdint>
#include <limits>

#include "../hd.h"

namespace rs {

// Entries of a scalar codebook in rising order (NaN last, of equal ones the lowest code first),
// with the middles between neighbours: the nearest entry of w is the one after all middles below w.
struct SortedEntries {
  int count;
  float middle[16];
  uint8_t code[16];

  RS_HD SortedEntries(const float* book, int n) : count(n), middle{}, code{} {
    for (int i = 0; i < n; ++i) {
      int place = 0;
      for (int j = 0; j < n; ++j)
        place += key(book[j]) < key(book[i]) || (j < i && key(book[j]) == key(book[i]));
      code[place] = static_cast<uint8_t>(i);
    }
    for (int i = 0; i + 1 < n; ++i) middle[i] = 0.5f * book[code[i]] + 0.5f * book[code[i + 1]];
  }

 private:
  RS_HD static float key(float entry) {
    return entry != entry ? std::numeric_limits<float>::infinity() : entry;
  }
};

// Importance-weighted squared distance of a pair.
RS_HD float pair_cost(float a, float b, float ha, float hb, float u, float v) {
  const float du = a - u, dv = b - v;
  return ha * du * du + hb * dv * dv;
}

}  // namespace rs
