// Rounding to the storage types of params and panels, in integer arithmetic.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "../hd.h"

namespace rs {

// Nearest float16 value (11-bit mantissa, ties to even), kept as float; a value that float16 cannot
// hold to that precision (beyond 65504, or below 2^-14) stays what it is.
RS_HD float round_to_half(float x) {
  const float magnitude = std::fabs(x);
  if (!(magnitude >= 6.103515625e-5f && magnitude < 65504.0f)) return x;
  uint32_t bits = std::bit_cast<uint32_t>(x);
  bits += 0x0FFFu + ((bits >> 13) & 1);
  return std::bit_cast<float>(bits & 0xFFFFE000u);
}

// Nearest bfloat16, ties to even; NaN stays NaN.
inline uint16_t to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t nan = (bits >> 16) | 0x40, rounded = (bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded);
}

}  // namespace rs
