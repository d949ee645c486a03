// The trellis search without intrinsics: loops of 32 that a compiler turns into vectors of any length.
#include "viterbi_pass.h"

namespace rs::viterbi {
namespace {

struct Generic {
  struct V {
    int16_t lane[32];
  };
  static constexpr int kLanes = 32, kGroup = 1;

  template <class F>
  static V each(F&& f) {
    V r;
    for (int l = 0; l < kLanes; ++l) r.lane[l] = static_cast<int16_t>(f(l));
    return r;
  }
  static int clamp(int x) { return x > kTop ? kTop : x < kBottom ? kBottom : x; }

  static V load(const int16_t* p) { return each([&](int l) { return p[l]; }); }
  static V fill(int x) { return each([&](int) { return x; }); }
  static V add(const V& x, const V& y) {
    return each([&](int l) { return clamp(x.lane[l] + y.lane[l]); });
  }
  static V sub(const V& x, const V& y) {
    return each([&](int l) { return clamp(x.lane[l] - y.lane[l]); });
  }
  static V min(const V& x, const V& y) {
    return each([&](int l) { return x.lane[l] < y.lane[l] ? x.lane[l] : y.lane[l]; });
  }
  static V mulhrs(const V& x, const V& y) {
    return each([&](int l) { return (x.lane[l] * y.lane[l] + 0x4000) >> 15; });
  }
  static V dot_bytes(const V& u8, const V& s8) {
    return each([&](int l) {
      return (u8.lane[l] & 255) * static_cast<int8_t>(s8.lane[l]) +
             (u8.lane[l] >> 8 & 255) * (s8.lane[l] >> 8);
    });
  }
  static V swap(const V& x) {
    return each([&](int l) { return x.lane[l ^ 1]; });
  }
  template <int N>
  static V spread(const int16_t* p) {
    return each([&](int l) { return p[l % N]; });
  }
  // Lane l goes to p[l % N * stride + l / N].
  template <int N>
  static void store(int16_t* p, int stride, const V& x) {
    for (int l = 0; l < kLanes; ++l) p[l % N * stride + l / N] = x.lane[l];
  }
  static int lowest(const V& x) {
    int low = kTop;
    for (int l = 0; l < kLanes; ++l) low = x.lane[l] < low ? x.lane[l] : low;
    return low;
  }
};

#include "viterbi_kernel.h"

}  // namespace

const KernelTable& generic_kernels() { return kTable<Generic>; }

}  // namespace rs::viterbi
