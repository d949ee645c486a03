// What the searches of the trellis codec minimise: the same integers on every device, so that all
// find the same codes. cpu/viterbi_pass.h says what the numbers are.
#pragma once

#include <algorithm>
#include <cmath>

#include "../hd.h"
#include "trellis.h"

namespace rs {

// fast: byte-sized points up to 3 bits and a shorter run to close the ring; up to 3 % more error at
// about twice the speed.
enum class Search { exact, fast };

namespace viterbi {

constexpr int kSteps = 128;
constexpr int kBottom = -32768, kTop = 32767;
constexpr int kCoarse = 90;

// Steps searched on each side of the ring's start to close it: for the exact search the whole tile.
// At 2 bits 32 would cost 0.6 % in error, 12 costs 1.9 %.
constexpr int seam_of(int k, Search search) {
  constexpr int kFast[6] = {16, 12, 12, 16, 8, 8};
  return search == Search::exact ? kSteps / 2 : kFast[k - 3];
}

// From 3.5 bits on the coarse grain's rounding would show.
constexpr bool is_coarse(int k, Search search) { return search == Search::fast && k <= 6; }

RS_HD int16_t nearest(float x) {
  if (x != x) return 0;
  return static_cast<int16_t>(std::clamp(std::floor(x + 0.5f), float{kBottom}, float{kTop}));
}

// R; 1 for a table of zeros.
RS_HD float largest_radius(const float* radius) {
  float largest = 0;
  for (int i = 0; i < kTrellisRadii; ++i) largest = std::max(largest, std::fabs(radius[i]));
  return largest > 0 ? largest : 1.0f;
}

// A component of a target in units of R; NaN counts as 0.
RS_HD float in_radii(float w, float largest) {
  return w != w ? 0.0f : std::clamp(w / largest, -1e6f, 1e6f);
}

// u, v and norm of a point in units of R.
RS_HD void fine_point(float u, float v, int16_t* values) {
  values[0] = nearest(32767 * u);
  values[1] = nearest(32767 * v);
  values[2] = nearest(8192 * (u * u + v * v));
}

// Both bytes, then norm.
RS_HD void coarse_point(float u, float v, int16_t* values) {
  const int p = nearest(kCoarse * u), q = nearest(kCoarse * v);
  values[0] = static_cast<int16_t>((p + kCoarse) | (q + kCoarse) << 8);
  values[1] = static_cast<int16_t>((p * p + q * q + 1) / 2);
}

struct Target {
  int a, b;
  int bound;  // -error of no state is more; the slack is for rounding
  int peak;   // error of no state is more
};

// These pull in targets, the fine ones beyond 1.49 R, the coarse beyond about twice R, so that
// every error fits int16.
RS_HD Target fine_target(float a, float b) {
  const float shrink = std::min(1.0f, 1.49f / std::sqrt(a * a + b * b));
  a *= shrink;
  b *= shrink;
  const float square = a * a + b * b;
  return {nearest(16384 * a), nearest(16384 * b), static_cast<int>(8192 * square) + 6,
          static_cast<int>(8192 + 16384 * std::sqrt(square)) + 6};
}

RS_HD Target coarse_target(float a, float b) {
  const float sum = std::fabs(a) + std::fabs(b), side = std::max(std::fabs(a), std::fabs(b));
  const float shrink = std::min(std::min(1.0f, 1.98f / sum), 1.4f / side);
  const int p = nearest(kCoarse * shrink * a), q = nearest(kCoarse * shrink * b);
  const int square = p * p + q * q, bytes = kCoarse * (p + q);  // what is added to the bytes
  const float along = (kCoarse + 1) * std::sqrt(static_cast<float>(square));
  return {p, q, std::max(0, square / 2 + bytes + 2),
          std::max(0, (kCoarse + 1) * (kCoarse + 1) / 2 - bytes + static_cast<int>(along) + 6)};
}

}  // namespace viterbi
}  // namespace rs
