#include "viterbi.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "../codecs/trellis.h"
#include "viterbi_pass.h"

namespace rs {

using namespace viterbi;

namespace {

// Starts at a cache line, so that a row of points never straddles two.
template <class T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};
  LineAllocator() = default;
  template <class U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* p, size_t) { ::operator delete(p, kLine); }
  bool operator==(const LineAllocator&) const { return true; }
};
using Buffer = std::vector<int16_t, LineAllocator<int16_t>>;

const KernelTable& kernels_for(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return avx512_kernels();
    case Isa::avx2:
      return avx2_kernels();
    default:
      return generic_kernels();
  }
}

}  // namespace

struct TrellisSearch::Impl {
  int k, seam;
  bool coarse;
  float largest;  // radius
  Kernels kernels;
  Buffer rows, columns;

  Impl(int k, const float* radius, const float* angle, Search search, Isa isa)
      : k(k),
        seam(seam_of(k, search)),
        coarse(is_coarse(k, search)),
        largest(largest_radius(radius)),
        kernels(kernels_for(isa)[coarse][k - 3]) {
    const PolarTable table(radius, angle);
    constexpr void (Impl::* kLayOut[])(const PolarTable&) = {&Impl::lay_out<3>, &Impl::lay_out<4>,
                                                             &Impl::lay_out<5>, &Impl::lay_out<6>,
                                                             &Impl::lay_out<7>, &Impl::lay_out<8>};
    (this->*kLayOut[k - 3])(table);
  }

  template <int K>
  void lay_out(const PolarTable& table) {
    const int arrays = coarse ? 2 : 3, overlaps = 1 << (16 - K);
    rows.resize(arrays << 16);
    columns.resize(arrays << 16);
    for (int s = 0; s < 1 << 16; ++s) {
      float w[2];
      table.point(static_cast<uint32_t>(s), w);
      int16_t values[3];
      (coarse ? coarse_point : fine_point)(w[0] / largest, w[1] / largest, values);
      const auto place = Rows<K>::place(s);
      for (int i = 0; i < arrays; ++i) {
        rows[(place.row * arrays + i) * 32 + place.lane] = values[i];
        columns[((s % overlaps * arrays + i) << K) + s / overlaps] = values[i];
      }
    }
  }

  // Up to kTiles targets from ring step `begin` on.
  void quantise(const float* targets, int64_t n, int begin, int steps, Targets& x) const {
    x.steps = steps;
    for (int i = 0; i < kTiles; ++i) {
      for (int t = 0; t < steps; ++t) {
        float w[2] = {0, 0};
        if (i < n) std::memcpy(w, targets + 256 * i + 2 * ((begin + t) % kSteps), sizeof w);
        const float a = in_radii(w[0], largest), b = in_radii(w[1], largest);
        const Target target = coarse ? coarse_target(a, b) : fine_target(a, b);
        x.a[t][i] =
            static_cast<int16_t>(coarse ? (target.a & 255) | (target.b & 255) << 8 : target.a);
        x.b[t][i] = static_cast<int16_t>(coarse ? 0 : target.b);
        x.bound[t][i] = target.bound;
        x.ceiling[t][i] = static_cast<int16_t>(kTop - target.peak);
      }
      x.bound[steps][i] = 0;
      x.ceiling[steps][i] = kTop;
    }
  }

  // One batch: a free run around the ring's start settles the overlap there, a second run is held
  // to it at both ends.
  void run(const float* targets, int64_t n, uint8_t* codes) const {
    thread_local Buffer metrics;
    const int overlaps = 1 << (16 - k), stride = metric_stride(k), batch = kTiles * stride;
    metrics.resize(size_t{kSteps + 1} * batch);
    Targets x;
    int overlap[kTiles];
    uint8_t dropped[kSteps][kTiles];

    quantise(targets, n, kSteps - seam, 2 * seam, x);
    for (int i = 0; i < kTiles; ++i)
      std::fill_n(&metrics[i * stride], overlaps, static_cast<int16_t>(kBottom + x.bound[0][i]));
    kernels.forward(x, rows.data(), metrics.data());
    for (int i = 0; i < kTiles; ++i) {
      const int16_t* last = &metrics[2 * seam * batch + i * stride];
      overlap[i] = static_cast<int>(std::min_element(last, last + overlaps) - last);
    }
    kernels.back(x, columns.data(), metrics.data(), seam, 2 * seam, overlap, dropped);

    quantise(targets, n, 0, kSteps, x);
    for (int i = 0; i < kTiles; ++i) {
      std::fill_n(&metrics[i * stride], overlaps, x.ceiling[0][i]);
      metrics[i * stride + overlap[i]] = static_cast<int16_t>(kBottom + x.bound[0][i]);
    }
    kernels.forward(x, rows.data(), metrics.data());
    kernels.back(x, columns.data(), metrics.data(), 0, kSteps, overlap, dropped);
    for (int i = 0; i < n; ++i) pack(dropped, i, codes + i * 16 * k);
  }

  // The ring is the dropped bits of its states in order.
  void pack(const uint8_t (*dropped)[kTiles], int tile, uint8_t* codes) const {
    uint32_t bits = 0;
    int held = 0;
    for (int t = 0; t < kSteps; ++t) {
      bits = bits << k | dropped[t][tile];
      held += k;
      if (held >= 16) {
        held -= 16;
        *codes++ = static_cast<uint8_t>(bits >> held);
        *codes++ = static_cast<uint8_t>(bits >> held >> 8);
      }
    }
  }
};

TrellisSearch::TrellisSearch(int k, const float* radius, const float* angle, Search search, Isa isa)
    : impl_(std::make_unique<Impl>(k, radius, angle, search, isa)) {}

TrellisSearch::~TrellisSearch() = default;

void TrellisSearch::run(const float* targets, int64_t n, uint8_t* codes) const {
  static_assert(kBatch == kTiles);
  for (int64_t i = 0; i < n; i += kTiles)
    impl_->run(targets + 256 * i, std::min<int64_t>(n - i, kTiles), codes + i * 16 * impl_->k);
}

}  // namespace rs
