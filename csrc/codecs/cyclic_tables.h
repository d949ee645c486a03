// The tables of the cyclic codes, integers once and for all: written down rather than computed, so
// every device and language has the same. Twin: reality_stone/codecs/cyclic_tables.py; tests hold
// both against the formulas.
#pragma once

#include <cstdint>

#include "../hd.h"

namespace rs {

// T[d][p] = round(127 cos(2 pi p / 16 + d pi / 2)): row d is the d-th derivative of row 0, and
// T[d][p] == T[0][(p + 4 d) & 15].
RS_TABLE int8_t kCyclic[4][16] = {
    {127, 117, 90, 49, 0, -49, -90, -117, -127, -117, -90, -49, 0, 49, 90, 117},
    {0, -49, -90, -117, -127, -117, -90, -49, 0, 49, 90, 117, 127, 117, 90, 49},
    {-127, -117, -90, -49, 0, 49, 90, 117, 127, 117, 90, 49, 0, -49, -90, -117},
    {0, 49, 90, 117, 127, 117, 90, 49, 0, -49, -90, -117, -127, -117, -90, -49},
};

// T16[d][p] = round(32767 cos(2 pi p / 64 + d pi / 2)), and T16[d][p] == T16[0][(p + 16 d) & 63].
struct Cyclic16 {
  int16_t at[4][64]{};
  constexpr Cyclic16() {
    constexpr int16_t quarter[17] = {32767, 32609, 32137, 31356, 30273, 28898, 27245, 25329, 23170,
                                     20787, 18204, 15446, 12539, 9512,  6393,  3212,  0};
    for (int d = 0; d < 4; ++d)
      for (int p = 0; p < 64; ++p) {
        const int turn = (p + 16 * d) % 64, half = turn <= 32 ? turn : 64 - turn;
        at[d][p] = static_cast<int16_t>(half <= 16 ? quarter[half] : -quarter[32 - half]);
      }
  }
};
inline constexpr Cyclic16 kCyclic16;

// round(32767 cos(2 pi k / 256 + d pi / 2)): every fourth column is one of kCyclic16.
struct Cyclic256 {
  int16_t at[4][256]{};
  constexpr Cyclic256() {
    constexpr int16_t quarter[65] = {
        32767, 32757, 32728, 32678, 32609, 32521, 32412, 32285, 32137, 31971, 31785, 31580, 31356,
        31113, 30852, 30571, 30273, 29956, 29621, 29268, 28898, 28510, 28105, 27683, 27245, 26790,
        26319, 25832, 25329, 24811, 24279, 23731, 23170, 22594, 22005, 21403, 20787, 20159, 19519,
        18868, 18204, 17530, 16846, 16151, 15446, 14732, 14010, 13279, 12539, 11793, 11039, 10278,
        9512,  8739,  7962,  7179,  6393,  5602,  4808,  4011,  3212,  2410,  1608,  804,   0};
    for (int d = 0; d < 4; ++d)
      for (int p = 0; p < 256; ++p) {
        const int turn = (p + 64 * d) % 256, half = turn <= 128 ? turn : 256 - turn;
        at[d][p] = static_cast<int16_t>(half <= 64 ? quarter[half] : -quarter[128 - half]);
      }
  }
};
inline constexpr Cyclic256 kCyclic256;

// The 8-bit scalar codes: kCyclicScalar[family][diff][phase], with x = (phase - 7.5) / 7.5
//   family 0  kCyclic
//          1  sinh(x) / sinh(1), its derivative cosh(x) / cosh(1), and again
//          2  exp(x) / e, its own derivative
//          3  tanh(2x) and its three derivatives, each over the largest magnitude among the sixteen
// times 127, rounded.
RS_TABLE int8_t kCyclicScalar[4][4][16] = {
    {{127, 117, 90, 49, 0, -49, -90, -117, -127, -117, -90, -49, 0, 49, 90, 117},
     {0, -49, -90, -117, -127, -117, -90, -49, 0, 49, 90, 117, 127, 117, 90, 49},
     {-127, -117, -90, -49, 0, 49, 90, 117, 127, 117, 90, 49, 0, -49, -90, -117},
     {0, 49, 90, 117, 127, 117, 90, 49, 0, -49, -90, -117, -127, -117, -90, -49}},
    {{-127, -106, -87, -69, -52, -37, -22, -7, 7, 22, 37, 52, 69, 87, 106, 127},
     {127, 115, 105, 98, 91, 87, 84, 82, 82, 84, 87, 91, 98, 105, 115, 127},
     {-127, -106, -87, -69, -52, -37, -22, -7, 7, 22, 37, 52, 69, 87, 106, 127},
     {127, 115, 105, 98, 91, 87, 84, 82, 82, 84, 87, 91, 98, 105, 115, 127}},
    {{17, 20, 22, 26, 29, 33, 38, 44, 50, 57, 65, 75, 85, 97, 111, 127},
     {17, 20, 22, 26, 29, 33, 38, 44, 50, 57, 65, 75, 85, 97, 111, 127},
     {17, 20, 22, 26, 29, 33, 38, 44, 50, 57, 65, 75, 85, 97, 111, 127},
     {17, 20, 22, 26, 29, 33, 38, 44, 50, 57, 65, 75, 85, 97, 111, 127}},
    {{-127, -124, -118, -110, -96, -77, -50, -17, 17, 50, 77, 96, 110, 118, 124, 127},
     {9, 15, 25, 39, 60, 85, 111, 127, 127, 111, 85, 60, 39, 25, 15, 9},
     {22, 36, 57, 84, 112, 127, 107, 43, -43, -107, -127, -112, -84, -57, -36, -22},
     {17, 26, 37, 45, 39, 2, -66, -127, -127, -66, 2, 39, 45, 37, 26, 17}},
};

}  // namespace rs
