// Polar tail-biting trellis: 1.5 to 4 bits per weight in halves.  K = 2 * bits new bits per state.
//
//   tile      16 x 16 weights, row by row; state n (0..127) carries weights 2n and 2n+1 of the tile
//   ring      128*K bits b_0, b_1, ... in 8*K little-endian uint16 words; word w holds
//   b[16w..16w+15],
//             first bit most significant
//   state n   the 16 ring bits from K*n on, first bit most significant; the ring closes on itself
//
//   p = state * 0xC83918A1 mod 2^32        one multiplication is the whole hash
//     31      30    27  26    21      15
//   | sign u |  phase  |  amp   | ... | sign v | ...
//   u = +-fl32(radius[amp] * cos(angle[phase])),   v = +-fl32(radius[amp] * sin(angle[phase]))
//
// Params: radius (64), angle (16), shared; out_scale (out), in_scale (in), the frame.
// Ring and hash-generated code after QTIP (Tseng et al., 2024); the polar table is this project's.
#pragma once

#include <cstring>
#include <memory>

#include "../codec.h"
#include "../hd.h"

namespace rs {

class TrellisSearch;
enum class Search;

constexpr uint32_t kTrellisMultiplier = 0xC83918A1u;
constexpr int kTrellisRadii = 64, kTrellisAngles = 16;

// cos and sin of an angle by their Taylor series in y = angle^2, in float64 with one rounding per
// operation: the same bits on every device, which a math library does not promise. Absolute error
// below 1e-15 for |angle| <= 2 and below 1e-7 for |angle| <= 2 pi.
RS_HD void polar_direction(float angle, float* cosine, float* sine) {
  const double x = angle, y = mul(x, x);
  double factorial = 1.0, c[14], s[14];
  for (int n = 0; n < 14; ++n) {
    const double sign = n % 2 ? -1.0 : 1.0;
    c[n] = sign / factorial;
    factorial *= 2 * n + 1;
    s[n] = sign / factorial;
    factorial *= 2 * n + 2;
  }
  double cos_y = c[13], sin_y = s[13];
  for (int n = 12; n >= 0; --n) {
    cos_y = add(mul(cos_y, y), c[n]);
    sin_y = add(mul(sin_y, y), s[n]);
  }
  *cosine = static_cast<float>(cos_y);
  *sine = static_cast<float>(mul(sin_y, x));
}

// The code's points in the first quarter turn: entry 64 * phase + amp, as the ten hash bits index
// it.
struct PolarTable {
  float radius[kTrellisRadii], cosine[kTrellisAngles], sine[kTrellisAngles];
  float u[1024], v[1024];

  PolarTable(const float* radii, const float* angles) {
    std::memcpy(radius, radii, sizeof radius);
    for (int p = 0; p < kTrellisAngles; ++p) polar_direction(angles[p], &cosine[p], &sine[p]);
    for (int i = 0; i < 1024; ++i) {
      u[i] = mul(radius[i & 63], cosine[i >> 6]);
      v[i] = mul(radius[i & 63], sine[i >> 6]);
    }
  }
  // The pair of weights a state stands for.
  RS_HD void point(uint32_t state, float* w) const {
    const uint32_t p = state * kTrellisMultiplier;
    const uint32_t i = (p >> 21) & 1023;
    w[0] = p >> 31 ? -u[i] : u[i];
    w[1] = (p >> 15) & 1 ? -v[i] : v[i];
  }
};

template <int K>
struct Trellis {
  static_assert(K >= 3 && K <= 8);
  static constexpr int kUnit = 2;  // weights per state
  static constexpr int kWords = 8 * K;
  enum Param { kRadius, kAngle, kOutScale, kInScale };

  struct Tables : PolarTable {
    explicit Tables(const Layer& layer) : PolarTable(layer.params[kRadius], layer.params[kAngle]) {}
  };

  RS_HD static uint32_t state(const uint8_t* tile, int n) {
    const int word = K * n / 16, next = (word + 1) % kWords;
    const uint32_t bits = static_cast<uint32_t>(tile[2 * word + 1]) << 24 |
                          static_cast<uint32_t>(tile[2 * word]) << 16 |
                          static_cast<uint32_t>(tile[2 * next + 1]) << 8 | tile[2 * next];
    return (bits >> (16 - K * n % 16)) & 0xFFFF;
  }

  RS_HD static void decode(const uint8_t* tile, int64_t, int64_t, int n, const Tables& tables,
                           float* w) {
    tables.point(state(tile, n), w);
  }

  // Shared sums: the gradient of the table's points, all u and then all v.
  static constexpr int kSums = 2048, kGain = 1;

  template <class Sums>
  RS_HD static void adjoint(const uint8_t* tile, int64_t, int64_t, int n, const Tables&,
                            const float* dw, Sums& sums) {
    const uint32_t p = state(tile, n) * kTrellisMultiplier, i = (p >> 21) & 1023;
    sums.shared(i, p >> 31 ? -dw[0] : dw[0]);
    sums.shared(1024 + i, (p >> 15) & 1 ? -dw[1] : dw[1]);
  }

  static constexpr int kFolds = kTrellisRadii + kTrellisAngles;
  RS_HD static void fold(int f, const Tables& t, const double* sum, float* const* grads) {
    const double *u = sum, *v = sum + 1024;
    double d = 0;
    if (f < kTrellisRadii) {
      for (int phase = 0; phase < kTrellisAngles; ++phase)
        d += t.cosine[phase] * u[64 * phase + f] + t.sine[phase] * v[64 * phase + f];
      if (grads[kRadius]) grads[kRadius][f] += static_cast<float>(d);
      return;
    }
    const int phase = f - kTrellisRadii;  // the adjoint of a turn: (du, dv) . (-v, u)
    for (int amp = 0; amp < kTrellisRadii; ++amp) {
      const int i = 64 * phase + amp;
      d += t.radius[amp] * (t.cosine[phase] * v[i] - t.sine[phase] * u[i]);
    }
    if (grads[kAngle]) grads[kAngle][phase] += static_cast<float>(d);
  }
};

// Calls visit.template operator()<K>() for k.
template <int K = 3, class Visit>
void with_trellis_bits(int k, Visit&& visit) {
  if (k == K) return visit.template operator()<K>();
  if constexpr (K < 8) with_trellis_bits<K + 1>(k, visit);
}

// The search for these tables, kept until other tables are asked for: error feedback asks for the
// same one thousands of times.
std::shared_ptr<const TrellisSearch> trellis_search(int k, const float* radius, const float* angle,
                                                    Search search);

// spec: trellis(bits=2, rotate=True, search=exact|fast)
std::vector<Term> trellis_terms(const Spec& spec, Shape shape);

}  // namespace rs
