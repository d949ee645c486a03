// Where 32 codes of uniform lie: for vpermb and a shift by lane.
#pragma once

#include "integers.h"

namespace rs {
namespace {

struct alignas(64) Ints {
  uint32_t at[16];
};

// 32 codes to 32-bit lanes, 16 at a time: the two bytes that hold a code, and its place in them.
template <int Bits>
struct Unpack {
  Bytes bytes[2]{};
  Ints shift{};
  constexpr Unpack() {
    for (int i = 0; i < 32; ++i) {
      for (int t = 0; t < 4; ++t)
        bytes[i / 16].at[i % 16 * 4 + t] = static_cast<uint8_t>(Bits * i / 8 + (t & 1));
      shift.at[i % 16] = static_cast<uint32_t>(Bits * i % 8);
    }
  }
};
template <int Bits>
constexpr Unpack<Bits> kUnpack;

}  // namespace
}  // namespace rs
