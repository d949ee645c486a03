// The 64 functions of a radius that bitfield codes name, tabulated over their radii.
//
//   function   16 * category + 4 * subcategory + order, each 0 to 3; the list is in
//              radial_functions.h
//   word 22    256 radii         r = amp * r_max/255                  entry 256 * function + amp
//   word 32    1024 radii, +-    r = (sign ? -1 : 1) * amp * r_max/1023, orders 0 and 1 only
//                                entry 4096 * (4 * category + subcategory) + 2048 * sign
//                                      + 1024 * order + amp
//
// The entries depend on a trained r_max, so they are computed at run time: in float64 by the fixed
// IEEE operations of reality_stone/codecs/radial.py and then rounded to float32, which gives the
// same bits on every machine where a math library promises none. Every entry is finite for every
// r_max: it is held to [0.5, 8], and a function with a pole holds its radius where it is tame.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "../hd.h"

namespace rs {

constexpr float kLeastRadius = 0.5f, kLargestRadius = 8.0f;

// What decode makes of any r_max; a NaN counts as the least.
RS_HD float held_r_max(float r_max) {
  const float low = r_max > kLeastRadius ? r_max : kLeastRadius;
  return low < kLargestRadius ? low : kLargestRadius;
}

struct RadialTable {
  std::vector<float> value;  // f(r)
  std::vector<float> slope;  // df/dr_max = f'(r) * dr/dr_max
};

constexpr int radial_entries(int word) { return word == 22 ? 1 << 14 : 1 << 16; }
constexpr int radial_radii(int word) { return word == 22 ? 256 : 2048; }

// The table of a word for any r_max; kept, since products ask for the same one again and again.
// Safe on any number of threads.
std::shared_ptr<const RadialTable> radial_table(int word, float r_max);

}  // namespace rs
