// The trellis search without intrinsics: 8 lanes of the compiler's own vectors.
#include <cstring>

#include "viterbi_pass.h"

namespace rs::viterbi {
namespace {

struct Generic {
  static constexpr int kLanes = 8, kGroup = 1;
  using V = int16_t __attribute__((vector_size(2 * kLanes)));
  using U = uint16_t __attribute__((vector_size(2 * kLanes)));
  using Pairs = int32_t __attribute__((vector_size(2 * kLanes)));
  using Fours = int64_t __attribute__((vector_size(2 * kLanes)));

  static V load(const int16_t* p) {
    V x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static V fill(int x) { return V{} + static_cast<int16_t>(x); }
  static V add(V x, V y) { return (V)((U)x + (U)y); }
  static V sub(V x, V y) { return (V)((U)x - (U)y); }
  static V saturating_sub(V x, V y) {
    const V sum = sub(x, y), over = ((x ^ sum) & (x ^ y)) >> 15;
    return (sum & ~over) | (((x >> 15) ^ kTop) & over);
  }
  static V min(V x, V y) { return x < y ? x : y; }
  static V mulhrs(V x, V y) {
    // Vectors have no widening product; loops get one, if they are not unrolled first.
    int16_t p[kLanes], q[kLanes];
    std::memcpy(p, &x, sizeof p);
    std::memcpy(q, &y, sizeof q);
#pragma GCC unroll 1
    for (int l = 0; l < kLanes; ++l) p[l] = static_cast<int16_t>((p[l] * q[l] + 0x4000) >> 15);
    return load(p);
  }
  static V dot_bytes(V u8, V s8) {
    return (u8 & 255) * ((V)((U)s8 << 8) >> 8) + (V)((U)u8 >> 8) * (s8 >> 8);
  }
  static V swap(V x) { return __builtin_shuffle(x, V{1, 0, 3, 2, 5, 4, 7, 6}); }
  template <int N>
  static V spread(const int16_t* p) {
    if constexpr (N == 2) {
      int32_t peers;
      std::memcpy(&peers, p, sizeof peers);
      return (V)(Pairs{} + peers);
    } else {
      int64_t peers;
      std::memcpy(&peers, p, sizeof peers);
      return (V)(Fours{} + peers);
    }
  }
  // Lane l goes to p[l % N * stride + l / N].
  template <int N>
  static void store(int16_t* p, int stride, V x) {
    for (int l = 0; l < kLanes; ++l) p[l % N * stride + l / N] = x[l];
  }
  static int lowest(V x) {
    int low = kTop;
    for (int l = 0; l < kLanes; ++l) low = x[l] < low ? x[l] : low;
    return low;
  }
};

#include "viterbi_kernel.h"

}  // namespace

const KernelTable& generic_kernels() { return kTable<Generic>; }

}  // namespace rs::viterbi
