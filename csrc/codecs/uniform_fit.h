// How the uniform codec fits a group's scale and zero: the same bits on every device.
#pragma once

#include <algorithm>
#include <cmath>

#include "../cpu/half.h"
#include "../hd.h"

namespace rs {

constexpr int64_t kUniformLanes = 16;  // partial sums, so that every device adds in one order

struct UniformFit {
  float scale = 0, zero = 0;
};

// Importance-weighted moments of codes q (relative to the middle code) and weights.
struct UniformMoments {
  double h, q, qq, w, qw, error;
};

// Weights near the ends of float32 are fitted times 2^-exponent, so that their squares are numbers
// too.
RS_HD int uniform_exponent(float peak) {
  return peak == 0 || (peak > 1e-12f && peak < 1e12f) ? 0 : std::ilogb(peak);
}

// The code whose value is nearest to w. inverse = 1/scale, or 0 for a zero scale.
RS_HD float nearest_code(float w, float inverse, float zero, float top) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: rounds to integers, ties to even
  return (std::min(std::max(w * inverse + zero, 0.0f), top) + kMagic) - kMagic;
}

RS_HD float inverse_of(float scale) { return scale != 0 ? 1.0f / scale : 0.0f; }

// Calls add(s, term) with one weight's terms of the moments in their order. middle: of the codes.
template <class Add>
RS_HD void uniform_terms(float x, float weight, UniformFit fit, float inverse, float top,
                         float middle, Add&& add) {
  const float code = nearest_code(x, inverse, fit.zero, top);
  const float miss = x - (code - fit.zero) * fit.scale, q = code - middle, hq = weight * q;
  add(0, weight);
  add(1, hq);
  add(2, hq * q);
  add(3, weight * x);
  add(4, hq * x);
  add(5, weight * miss * miss);
}

// Least squares for the codes that the moments were taken of: w = scale * (code - zero).
RS_HD UniformFit solve_uniform(const UniformMoments& m, UniformFit fit, int top, bool symmetric) {
  if (symmetric) {
    if (m.qq > 0) fit.scale = round_to_half(static_cast<float>(m.qw / m.qq));
    return fit;
  }
  const double determinant = m.h * m.qq - m.q * m.q;
  if (determinant <= 1e-6 * m.h * m.qq) return fit;
  const double scale = (m.h * m.qw - m.q * m.w) / determinant, offset = (m.w - scale * m.q) / m.h;
  const float held = round_to_half(static_cast<float>(scale));
  if (held == 0) return fit;
  return {held, round_to_half(static_cast<float>(0.5 * (top + 1) - offset / held))};
}

// Best scale (and zero) over a grid of clipping ranges; the best few are polished by alternating
// refits until the error stops falling. Scales are held to float16 values, so that storing them so
// is exact. low, high: the group's least and largest weight; moments(fit): of its nearest codes.
template <class Moments>
RS_HD UniformFit fit_uniform(float low, float high, int bits, bool symmetric, Moments&& moments) {
  const int top = (1 << bits) - 1;
  const float peak = std::max(std::fabs(low), std::fabs(high));
  const float middle = static_cast<float>(1 << (bits - 1));
  if (peak == 0) return {0, symmetric ? middle : 0};
  if (!symmetric && low == high) return {round_to_half(low), -1};  // one level carries it

  constexpr int kCandidates = 24, kPolished = 5;
  UniformFit found[kPolished + 1];  // by rising error, of equal ones the first found
  double errors[kPolished + 1];
  int count = 0;
  // Low rates clip the tails hard, high rates hardly at all.
  const float deepest = bits <= 3 ? 0.65f : bits == 4 ? 0.45f : 0.2f;
  for (int c = 0; c < kCandidates; ++c) {
    const float shrink = 1.0f - deepest * c / kCandidates;
    UniformFit fit;
    if (symmetric) {
      // The range is one longer below zero: turn its long side toward the largest weight.
      fit = {round_to_half((-low >= high ? 1.0f : -1.0f) * shrink * peak / middle), middle};
    } else {
      const float center = 0.5f * low + 0.5f * high, span = shrink * (high - low);
      fit.scale = round_to_half(span / top);
      fit.zero = round_to_half((0.5f * span - center) * inverse_of(fit.scale));
    }
    if (fit.scale == 0 || !std::isfinite(fit.scale) || !std::isfinite(fit.zero)) continue;
    const double error = moments(fit).error;
    int at = count;
    for (; at > 0 && error < errors[at - 1]; --at) {
      found[at] = found[at - 1];
      errors[at] = errors[at - 1];
    }
    found[at] = fit;
    errors[at] = error;
    count = std::min(count + 1, kPolished);
  }
  if (count == 0) return {0, symmetric ? middle : 0};
  UniformFit best = found[0];
  double least = errors[0];
  for (int c = 0; c < count; ++c) {
    UniformFit now = found[c];
    double error = errors[c];
    for (int round = 0; round < 30; ++round) {
      const UniformFit fit = solve_uniform(moments(now), now, top, symmetric);
      const double next = moments(fit).error;
      if (!(next < error * (1 - 1e-6)) || !std::isfinite(fit.zero)) break;
      now = fit;
      error = next;
    }
    if (error < least) {
      least = error;
      best = now;
    }
  }
  return best;
}

}  // namespace rs
