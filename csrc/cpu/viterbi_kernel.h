// The search's inner loops, written over a Simd type S of S::kLanes int16. Included inside an unnamed
// namespace by one file per instruction set, which includes viterbi_pass.h first.

// The exact search reads its points in rows of 32 states [u 32 | v 32 | norm 32] so arranged that all
// states of a row take one dropped value, and their overlaps after the step follow from
// kPeers neighbouring overlaps before it:
//
//     lane  0            1            2          ...
//           hi, new 0    hi+1, new 0  hi, new 1  ...      o' = hi << K | new
//
// One broadcast of kPeers metrics then serves a row, without a permutation.
// For K = 8, where o' is all new bits, the peers are two dropped values instead.
template <int K>
struct Rows {
  static constexpr int kPeers = K == 3 ? 4 : 2;
  static constexpr bool kPeersDropped = K == 8;
  static constexpr int kOverlaps = 1 << (16 - K);
  static constexpr int kHigh = kPeersDropped ? kPeers : 1 << (16 - 2 * K);
  static constexpr int kDropped = kPeersDropped ? (1 << K) / kPeers : 1 << K;  // rows per block
  static constexpr int kNew = 32 / kPeers;                                    // new values per row
  static constexpr int kParts = (1 << K) / kNew;
};

template <class S, int K>
void exact_pass(const Targets& x, const int16_t* rows, int16_t* metrics) {
  using R = Rows<K>;
  using V = typename S::V;
  constexpr int kGroup = S::kGroup;
  int32_t low[kTiles];
  for (int i = 0; i < kTiles; ++i) low[i] = kBottom + x.bound[0][i];
  for (int t = 0; t < x.steps; ++t)
    for (int g = 0; g < kTiles; g += kGroup) {
      const int16_t* from = metrics + (int64_t{t} * kTiles + g) * R::kOverlaps;
      int16_t* to = metrics + (int64_t{t + 1} * kTiles + g) * R::kOverlaps;
      V a[kGroup], b[kGroup], lowest[kGroup];
      int16_t shift[kGroup];
      for (int i = 0; i < kGroup; ++i) {
        a[i] = S::fill(x.a[t][g + i]);
        b[i] = S::fill(x.b[t][g + i]);
        lowest[i] = S::fill(kTop);
        const int32_t d = low[g + i] - (kBottom + x.bound[t][g + i] + x.bound[t + 1][g + i]);
        shift[i] = static_cast<int16_t>(d > kTop ? kTop : d < kBottom ? kBottom : d);
      }
      const int16_t* block = rows;
      for (int hi = 0; hi < R::kHigh; hi += R::kPeers)
        for (int part = 0; part < R::kParts; ++part, block += R::kDropped * 96)
          for (int lane = 0; lane < 32; lane += S::kLanes) {
            V best[kGroup];
            for (int i = 0; i < kGroup; ++i) best[i] = S::fill(kTop);
            const int16_t* m = from + hi;
            const int16_t* p = block + lane;
            for (int d = 0; d < R::kDropped; ++d, m += R::kHigh, p += 96) {
              const V u = S::load(p), v = S::load(p + 32), norm = S::load(p + 64);
              for (int i = 0; i < kGroup; ++i) {
                const V error = S::sub(S::sub(norm, S::mulhrs(u, a[i])), S::mulhrs(v, b[i]));
                const V before = S::template spread<R::kPeers>(m + i * R::kOverlaps);
                best[i] = S::min(best[i], S::add(error, before));
              }
            }
            const int at = (hi << K) + part * R::kNew + lane / R::kPeers;
            for (int i = 0; i < kGroup; ++i) {
              if (R::kPeersDropped) best[i] = S::min(best[i], S::swap(best[i]));
              const V after = S::sub(best[i], S::fill(shift[i]));
              lowest[i] = S::min(lowest[i], after);
              S::template store<R::kPeers>(to + i * R::kOverlaps + at, R::kPeersDropped ? 0 : 1 << K,
                                           after);
            }
          }
      for (int i = 0; i < kGroup; ++i) low[g + i] = S::lowest(lowest[i]);
    }
}

inline int16_t saturate(int x) {
  return static_cast<int16_t>(x > kTop ? kTop : x < kBottom ? kBottom : x);
}

inline int16_t product(int16_t x, int16_t y) {
  return static_cast<int16_t>((x * y + 0x4000) >> 15);
}

// columns: the same points, per overlap after the step, [u | v | norm] of 2^K dropped values each.
template <int K>
void trace_pass(const Targets& x, const int16_t* columns, const int16_t* metrics, int first,
                int* overlap, uint8_t* dropped) {
  constexpr int kOverlaps = 1 << (16 - K), kDropped = 1 << K, kHigh = 1 << (16 - 2 * K);
  for (int t = x.steps - 1; t >= first; --t)
    for (int i = 0; i < kTiles; ++i) {
      const int16_t* p = columns + overlap[i] * 3 * kDropped;
      const int16_t* m = metrics + (int64_t{t} * kTiles + i) * kOverlaps + (overlap[i] >> K);
      const int16_t a = x.a[t][i], b = x.b[t][i];
      int16_t cost[kDropped];
      for (int d = 0; d < kDropped; ++d) {
        const int16_t part = saturate(p[2 * kDropped + d] - product(p[d], a));
        cost[d] = saturate(part - product(p[kDropped + d], b));
      }
      int best = 0, lowest = kTop + 1;
      for (int d = 0; d < kDropped; ++d) {
        const int c = saturate(cost[d] + m[d * kHigh]);
        if (c < lowest) lowest = c, best = d;
      }
      dropped[t * kTiles + i] = static_cast<uint8_t>(best);
      overlap[i] = best << (16 - 2 * K) | overlap[i] >> K;
    }
}

template <class S>
struct Table {
  static constexpr Kernels kKernels[6] = {
      {exact_pass<S, 3>, trace_pass<3>}, {exact_pass<S, 4>, trace_pass<4>},
      {exact_pass<S, 5>, trace_pass<5>}, {exact_pass<S, 6>, trace_pass<6>},
      {exact_pass<S, 7>, trace_pass<7>}, {exact_pass<S, 8>, trace_pass<8>}};
};
