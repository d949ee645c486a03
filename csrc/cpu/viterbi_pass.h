// What the search's front (viterbi.cpp) hands to its kernels, one set of them per instruction set.
//
// Step t reads state s, 16 bits of the ring, split in two ways:
//
//     bits   15 ......... K | K-1 .. 0         15 .. 16-K | 15-K ......... 0
//     s    =  overlap before | new         =    dropped   |  overlap after
//
// metric_t[o] is the cost of the best path that comes to step t with overlap o, so one step is
//
//     metric_{t+1}[o'] = min over d of  metric_t[s >> K] + error_t(s),   s = d << (16-K) | o'
//
// and the 65536 costs themselves are never stored. All is int16. With R the table's largest radius,
// R^2 is 8192, and (a, b), 16384/R times the target pair, meets points scaled to R = 32767:
//
//     error(s) = |point|^2 - 2 <point, target> = norm[s] - mulhrs(u[s], a) - mulhrs(v[s], b)
//     mulhrs(x, y) = (x * y + 0x4000) >> 15;  every sum and difference saturates
//
// |target|^2 is left out, so errors go down to -bound. Metrics are therefore kept with their lowest at
// kBottom + bound or a little above: nothing saturates at the bottom, and what saturates at the top
// has lost. Of equal paths the one with the lowest d wins. Every instruction set gives equal bits.
#pragma once

#include <cstdint>

namespace rs::viterbi {

constexpr int kSteps = 128, kTiles = 4;
constexpr int kBottom = -32768, kTop = 32767;

// The targets of a pass, the tiles side by side within a step.
struct Targets {
  int steps;
  int16_t a[kSteps][kTiles], b[kSteps][kTiles];
  int32_t bound[kSteps + 1][kTiles];  // at least -error of every state; the last entry is unused
};

// One for each K from 3 on.
struct Kernels {
  // metrics[t][tile][o] for all t up to steps, the first given with its lowest at kBottom + bound.
  void (*exact)(const Targets&, const int16_t* rows, int16_t* metrics);
  // Walks back from the overlaps after the last step down to step `first`; returns in `overlap` those
  // before it, and in dropped[t][tile] the bits on the way.
  void (*trace)(const Targets&, const int16_t* columns, const int16_t* metrics, int first,
                int* overlap, uint8_t* dropped);
};

const Kernels* generic_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace rs::viterbi
