// What the trellis search's front (viterbi.cpp) hands to its kernels, one set per instruction set.
//
// Step t reads state s, 16 bits of the ring, which is split in two ways:
//
//     bits   15 ......... K | K-1 .. 0         15 .. 16-K | 15-K ......... 0
//     s    =  overlap before | new         =    dropped   |  overlap after
//
// metric_t[o] is the cost of the best path that comes to step t with overlap o, so one step is
//
//     metric_{t+1}[o'] = min over d of  metric_t[s >> K] + error_t(s),   s = d << (16-K) | o'
//
// and the 65536 costs are never stored. Nor are the choices: the walk back has the metrics of every
// step and repeats the minimum where the path goes through. Of equal paths the lowest d wins.
//
// All is int16, in one of two grains, where R is the table's largest radius:
//
//     fine     R = 32767 in u and v,  a and b = 16384 * target / R,  R^2 = 8192 in norm
//              error = norm - mulhrs(u, a) - mulhrs(v, b),   mulhrs(x, y) = (x * y + 0x4000) >> 15
//     coarse   R = 90 in u and v, which are bytes with 90 added,  a and b = 90 * target / R, signed
//              bytes,  R^2 = 4050 in norm;   error = norm - (u * a + v * b)
//
// Either is |point - target|^2 less what depends on the target alone: from -bound to peak. Metrics
// are kept with their lowest at kBottom + bound or a little above and are cut at kTop - peak, where
// a path has lost: so no sum of a metric and an error leaves int16, and sums may wrap, which some
// processors do twice as fast as saturating.
#pragma once

#include <cstdint>

#include "../codecs/trellis_search.h"

namespace rs::viterbi {

constexpr int kTiles = 4;  // taken through a pass together: the points are read once for all

// int16 from one tile's metrics to the next one's. A step reads at strides of a power of two in
// each tile; a line more keeps the tiles out of each other's cache sets.
constexpr int metric_stride(int k) { return (1 << (16 - k)) + 32; }

// The targets of a pass, the tiles side by side within a step.
struct Targets {
  int steps;
  int16_t a[kSteps][kTiles];  // coarse: a in the low byte, b in the high byte
  int16_t b[kSteps][kTiles];
  int32_t bound[kSteps + 1][kTiles];    // of Target; the last is 0
  int16_t ceiling[kSteps + 1][kTiles];  // kTop - peak: of the metrics before the step
};

struct Kernels {
  // From the metrics before the first step, with their lowest at kBottom + bound, computes those
  // before and after all others: metrics[steps + 1][kTiles][metric_stride(K)].
  void (*forward)(const Targets&, const int16_t* rows, int16_t* metrics);
  // Walks back over steps last - 1 to first. overlap: after the steps, on return before them.
  void (*back)(const Targets&, const int16_t* columns, const int16_t* metrics, int first, int last,
               int* overlap, uint8_t (*dropped)[kTiles]);
};

// K = 3 to 8 in the fine grain, then in the coarse.
using KernelTable = Kernels[2][6];
const KernelTable& generic_kernels();
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();

// Points are laid out twice, in runs of [u | v | norm] (fine) or [u + 256 v | norm] (coarse).
//
// columns: a run per overlap after the step, of its 2^K dropped values.
// rows: runs of 32 states that share a dropped value, in the order in which `forward` reads them:
// by block of overlaps after the step, then by dropped value. Neighbours in a row are kPeers
// overlaps before the step, so that one broadcast of kPeers metrics serves the row:
//
//     lane   0           1               2           3
//            hi, new 0   hi + 1, new 0   hi, new 1   hi + 1, new 1 ...      o' = hi << K | new
//
// At K = 8 overlaps before are dropped values and nothing else, so the peers are two of these.
template <int K>
struct Rows {
  static constexpr bool kPeersDropped = K == 8;
  static constexpr int kPeers = K == 3 ? 4 : 2;
  static constexpr int kNew = 32 / kPeers;                                  // new values in a row
  static constexpr int kParts = (1 << K) / kNew;                            // rows for all of them
  static constexpr int kDropped = (1 << K) / (kPeersDropped ? kPeers : 1);  // rows in a block
  static constexpr int kHigh = kPeersDropped ? kPeers : 1 << (16 - 2 * K);  // metrics between them

  struct Place {
    int row, lane;
  };
  static constexpr Place place(int state) {
    const int dropped = state >> (16 - K), fresh = state & ((1 << K) - 1);
    const int hi = (state >> K) & (kHigh - 1), part = fresh / kNew;
    if (kPeersDropped)
      return {part * kDropped + dropped / kPeers, fresh % kNew * kPeers + dropped % kPeers};
    return {(hi / kPeers * kParts + part) * kDropped + dropped,
            fresh % kNew * kPeers + hi % kPeers};
  }
};

}  // namespace rs::viterbi
