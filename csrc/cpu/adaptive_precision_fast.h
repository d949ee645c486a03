// Fast slots of adaptive_precision, and the places of its codes.
#pragma once

#include "../codecs/adaptive_precision.h"
#include "fast.h"

namespace rs {

void adaptive_precision_avx2_slots(Row& row);
void adaptive_precision_avx512_slots(Row& row);

inline void adaptive_precision_fast_slots(Row& row, Isa isa) {
#if RS_FAST_X86
  if (isa >= Isa::avx2) adaptive_precision_avx2_slots(row);
  if (isa >= Isa::avx512) adaptive_precision_avx512_slots(row);
#endif
}

constexpr uint8_t kAdaptiveClass[4] = {0, 1, 2, 2};  // of two bits of the map

// A group's codes in 32-bit lanes: the two bytes that hold code j, its shift there, and what
// follows. Lookups by class keep branches out of the loops, which random maps would mispredict.
struct AdaptiveUnpack {
  struct Kind {
    alignas(64) uint8_t bytes[64];  // of lane j: bytes[4j], bytes[4j+1]; 0x80 (zero) in the others
    alignas(64) uint32_t shift[16];
    int32_t top, size;
    float unit;
  };
  Kind kind[3]{};
  // Byte numbers count from the first byte of each run of `half` codes.
  constexpr explicit AdaptiveUnpack(int half) {
    for (int k = 0; k < 3; ++k) {
      const int bits = kAdaptiveBits[k];
      kind[k].top = kAdaptiveTop[k];
      kind[k].size = 2 * bits;
      kind[k].unit = kAdaptiveUnit[k];
      for (int j = 0; j < 16; ++j) {
        const int at = bits * (j % half);
        kind[k].shift[j] = static_cast<uint32_t>(at % 8);
        for (int b = 0; b < 4; ++b)
          kind[k].bytes[4 * j + b] = static_cast<uint8_t>(b < 2 ? at / 8 + b : 0x80);
      }
    }
  }
};

}  // namespace rs
