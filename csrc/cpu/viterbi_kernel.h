// The trellis search's inner loops over a Simd type S of S::kLanes int16; see viterbi_pass.h. Each
// instruction set's file includes this inside its own unnamed namespace, where the compiler may use
// that set, so nothing here may call a function that another file shares.

inline int saturate(int x) { return x > kTop ? kTop : x < kBottom ? kBottom : x; }

// A grain: kArrays int16 per point, and its error, by vectors and one by one.
template <class S>
struct Fine {
  using V = typename S::V;
  static constexpr int kArrays = 3;
  V a, b;

  Fine() = default;
  Fine(int16_t a, int16_t b) : a(S::fill(a)), b(S::fill(b)) {}

  struct Points {
    V u, v, norm;
    explicit Points(const int16_t* p) : u(S::load(p)), v(S::load(p + 32)), norm(S::load(p + 64)) {}
  };
  V error(const Points& p) const {
    return S::sub(S::sub(p.norm, S::mulhrs(p.u, a)), S::mulhrs(p.v, b));
  }
  static int error(const int16_t* p, int stride, int a, int b) {
    return p[2 * stride] - ((p[0] * a + 0x4000) >> 15) - ((p[stride] * b + 0x4000) >> 15);
  }
};

template <class S>
struct Coarse {
  using V = typename S::V;
  static constexpr int kArrays = 2;
  V ab;

  Coarse() = default;
  Coarse(int16_t ab, int16_t) : ab(S::fill(ab)) {}

  struct Points {
    V uv, norm;
    explicit Points(const int16_t* p) : uv(S::load(p)), norm(S::load(p + 32)) {}
  };
  V error(const Points& p) const { return S::sub(p.norm, S::dot_bytes(p.uv, ab)); }
  static int error(const int16_t* p, int stride, int ab, int) {
    const int a = static_cast<int8_t>(ab), b = ab >> 8;
    return p[stride] - ((p[0] & 255) * a + (p[0] >> 8 & 255) * b);
  }
};

template <class S, class Grain, int K>
void forward(const Targets& x, const int16_t* rows, int16_t* metrics) {
  using R = Rows<K>;
  using V = typename S::V;
  constexpr int kGroup = S::kGroup, kStride = metric_stride(K), kRow = 32 * Grain::kArrays;
  int32_t low[kTiles];
  for (int i = 0; i < kTiles; ++i) low[i] = kBottom + x.bound[0][i];
  for (int64_t t = 0; t < x.steps; ++t)
    for (int first = 0; first < kTiles; first += kGroup) {
      const int16_t* from = metrics + (t * kTiles + first) * kStride;
      int16_t* to = metrics + ((t + 1) * kTiles + first) * kStride;
      Grain grain[kGroup];
      V lowest[kGroup], ceiling[kGroup];
      int16_t drop[kGroup];  // lowers the metrics; known before the step, which saves a pass
      for (int i = 0; i < kGroup; ++i) {
        const int tile = first + i;
        grain[i] = Grain(x.a[t][tile], x.b[t][tile]);
        lowest[i] = S::fill(kTop);
        ceiling[i] = S::fill(x.ceiling[t + 1][tile]);
        drop[i] = static_cast<int16_t>(
            saturate(low[tile] - kBottom - x.bound[t][tile] - x.bound[t + 1][tile]));
      }
      const int16_t* block = rows;
      for (int hi = 0; hi < R::kHigh; hi += R::kPeers)
        for (int part = 0; part < R::kParts; ++part, block += R::kDropped * kRow)
          for (int lane = 0; lane < 32; lane += S::kLanes) {
            V best[kGroup];
            for (int i = 0; i < kGroup; ++i) best[i] = S::fill(kTop);
            for (int d = 0; d < R::kDropped; ++d) {
              const typename Grain::Points points(block + d * kRow + lane);
              for (int i = 0; i < kGroup; ++i) {
                const int16_t* metric = from + i * kStride + hi + d * R::kHigh;
                const V before = S::template spread<R::kPeers>(metric);
                best[i] = S::min(best[i], S::add(grain[i].error(points), before));
              }
            }
            const int after = (hi << K) + part * R::kNew + lane / R::kPeers;
            for (int i = 0; i < kGroup; ++i) {
              if constexpr (R::kPeersDropped) best[i] = S::min(best[i], S::swap(best[i]));
              const V metric = S::min(S::saturating_sub(best[i], S::fill(drop[i])), ceiling[i]);
              lowest[i] = S::min(lowest[i], metric);
              // Where peers are dropped values their lanes are equal by now and go to one place.
              S::template store<R::kPeers>(to + i * kStride + after, R::kPeersDropped ? 0 : 1 << K,
                                           metric);
            }
          }
      for (int i = 0; i < kGroup; ++i) low[first + i] = S::lowest(lowest[i]);
    }
}

template <class Grain, int K>
void back(const Targets& x, const int16_t* columns, const int16_t* metrics, int first, int last,
          int* overlap, uint8_t (*dropped)[kTiles]) {
  constexpr int kStride = metric_stride(K), kDropped = 1 << K, kHigh = 1 << (16 - 2 * K);
  for (int64_t t = last - 1; t >= first; --t)
    for (int i = 0; i < kTiles; ++i) {
      const int16_t* points = columns + overlap[i] * Grain::kArrays * kDropped;
      const int16_t* metric = metrics + (t * kTiles + i) * kStride + (overlap[i] >> K);
      const int a = x.a[t][i], b = x.b[t][i];
      int32_t before[kDropped];
      for (int d = 0; d < kDropped; ++d) before[d] = metric[d * kHigh];
      int32_t best = INT32_MAX;  // cost above, dropped value in the low byte
      for (int d = 0; d < kDropped; ++d) {
        const int error = Grain::error(points + d, kDropped, a, b);
        const int32_t cost = (error + before[d]) * 256 + d;
        best = cost < best ? cost : best;
      }
      best &= 255;
      dropped[t][i] = static_cast<uint8_t>(best);
      overlap[i] = best << (16 - 2 * K) | overlap[i] >> K;
    }
}

template <class S, class Grain, int K>
constexpr Kernels kKernels = {forward<S, Grain, K>, back<Grain, K>};

template <class S>
constexpr KernelTable kTable = {
    {kKernels<S, Fine<S>, 3>, kKernels<S, Fine<S>, 4>, kKernels<S, Fine<S>, 5>,
     kKernels<S, Fine<S>, 6>, kKernels<S, Fine<S>, 7>, kKernels<S, Fine<S>, 8>},
    {kKernels<S, Coarse<S>, 3>, kKernels<S, Coarse<S>, 4>, kKernels<S, Coarse<S>, 5>,
     kKernels<S, Coarse<S>, 6>, kKernels<S, Coarse<S>, 7>, kKernels<S, Coarse<S>, 8>}};
