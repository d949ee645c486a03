#include "viterbi.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../codecs/trellis.h"
#include "viterbi_pass.h"

namespace rs {

using namespace viterbi;

namespace {

// Steps on each side of the ring's start in the pass that closes it.
int seam(int k) {
  static const char* e = getenv("SEAM");
  return e ? atoi(e) : 32; }

int16_t round_to_int16(float x) {
  return static_cast<int16_t>(std::clamp(std::floor(x + 0.5f), float{kBottom}, float{kTop}));
}

}  // namespace

struct TrellisSearch::Impl {
  int k;
  Search search;
  float largest = 0;
  const Kernels* kernels;
  std::vector<int16_t> rows, columns;

  Impl(int k, const float* radius, const float* angle, Search search, Isa isa)
      : k(k), search(search), rows(3 * 65536), columns(3 * 65536) {
    kernels = (isa == Isa::avx512 ? avx512_kernels() : isa == Isa::avx2 ? avx2_kernels() : generic_kernels()) + (k - 3);
    for (int i = 0; i < kTrellisRadii; ++i) largest = std::max(largest, std::fabs(radius[i]));
    if (!(largest > 0)) largest = 1;
    const PolarTable points(radius, angle);
    const int peers = k == 3 ? 4 : 2, dropped = 1 << k;
    for (int s = 0; s < 65536; ++s) {
      float w[2];
      points.point(static_cast<uint32_t>(s), w);
      w[0] /= largest;
      w[1] /= largest;
      const int16_t u = round_to_int16(32767 * w[0]), v = round_to_int16(32767 * w[1]),
                    norm = round_to_int16(8192 * (w[0] * w[0] + w[1] * w[1]));
      const int after = s & ((1 << (16 - k)) - 1), d = s >> (16 - k);
      int16_t* column = &columns[after * 3 * dropped + d];
      column[0] = u, column[dropped] = v, column[2 * dropped] = norm;
      const int hi = after >> k, nu = after & (dropped - 1), each = 32 / peers, parts = dropped / each;
      const int64_t row = k < 8 ? (int64_t{hi / peers} * parts + nu / each) * dropped + d
                                : int64_t{nu / each} * (dropped / 2) + d / 2;
      const int lane = nu % each * peers + (k < 8 ? hi : d) % peers;
      int16_t* r = &rows[row * 96 + lane];
      r[0] = u, r[32] = v, r[64] = norm;
    }
  }

  // Ring steps begin, begin + 1, ... of up to kTiles tiles.
  void quantise(const float* targets, int64_t n, int begin, int steps, Targets& x) const {
    x.steps = steps;
    for (int i = 0; i < kTiles; ++i) {
      for (int t = 0; t < steps; ++t) {
        float w[2] = {0, 0};
        if (i < n) std::memcpy(w, targets + 256 * i + 2 * ((begin + t) % kSteps), sizeof w);
        for (float& c : w) { c = c / largest; if (!(std::fabs(c) <= 1e6f)) c = c > 0 ? 1e6f : c < 0 ? -1e6f : 0.f; }
        float length = std::sqrt(w[0] * w[0] + w[1] * w[1]);
        if (length > 2) { w[0] *= 1.999f / length; w[1] *= 1.999f / length; length = 2; }
        x.a[t][i] = round_to_int16(16384 * w[0]);
        x.b[t][i] = round_to_int16(16384 * w[1]);
        x.bound[t][i] = static_cast<int32_t>(8192 * (length > 1 ? 2 * length - 1 : length * length)) + 4;
      }
      x.bound[steps][i] = 0;
    }
  }

  void search_exact(const float* targets, int64_t n, uint8_t* codes) const {
    const int overlaps = 1 << (16 - k);
    thread_local std::vector<int16_t> metrics;
    metrics.resize(size_t{kSteps + 1} * kTiles * overlaps);
    Targets x;
    uint8_t dropped[kSteps * kTiles];
    int overlap[kTiles];
    const int half = seam(k);
    quantise(targets, n, kSteps - half, 2 * half, x);
    for (int i = 0; i < kTiles; ++i)
      std::fill_n(&metrics[i * overlaps], overlaps, kBottom + x.bound[0][i]);
    kernels->exact(x, rows.data(), metrics.data());
    for (int i = 0; i < kTiles; ++i) {
      const int16_t* last = &metrics[(size_t{2} * half * kTiles + i) * overlaps];
      overlap[i] = static_cast<int>(std::min_element(last, last + overlaps) - last);
    }
    kernels->trace(x, columns.data(), metrics.data(), half, overlap, dropped);
    quantise(targets, n, 0, kSteps, x);
    for (int i = 0; i < kTiles; ++i) {
      std::fill_n(&metrics[i * overlaps], overlaps, kTop);
      metrics[i * overlaps + overlap[i]] = kBottom + x.bound[0][i];
    }
    kernels->exact(x, rows.data(), metrics.data());
    kernels->trace(x, columns.data(), metrics.data(), 0, overlap, dropped);
    for (int i = 0; i < n; ++i) pack(dropped + i, codes + i * 16 * k);
  }

  void pack(const uint8_t* dropped, uint8_t* codes) const {
    uint32_t bits = 0;
    int held = 0;
    for (int t = 0; t < kSteps; ++t) {
      bits = bits << k | dropped[t * kTiles];
      held += k;
      if (held >= 16) {
        held -= 16;
        const uint32_t word = bits >> held;
        *codes++ = static_cast<uint8_t>(word);
        *codes++ = static_cast<uint8_t>(word >> 8);
      }
    }
  }
};

TrellisSearch::TrellisSearch(int k, const float* radius, const float* angle, Search search, Isa isa)
    : impl_(std::make_unique<Impl>(k, radius, angle, search, isa)) {}
TrellisSearch::~TrellisSearch() = default;

void TrellisSearch::run(const float* targets, int64_t n, uint8_t* codes) const {
  for (int64_t i = 0; i < n; i += kTiles)
    impl_->search_exact(targets + 256 * i, std::min<int64_t>(n - i, kTiles), codes + i * 16 * impl_->k);
}

}  // namespace rs
