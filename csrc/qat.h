// Quantization of a weight to learned levels: what reality_stone/quantizers/formulas.py defines,
// for host and device alike. No torch header.
#pragma once

#include <cmath>
#include <cstring>

#include "hd.h"

namespace rs::qat {

enum class Mode { ste, attenuated, codebook, gumbel };

constexpr int kMaxLevels = 256;

// Where the hard modes pass the gradient on: half a step beyond the outer levels.
struct Range {
  float low, high, low_step, high_step;
};

struct Settings {
  const float* centers;
  int count;
  Mode mode;
  float inverse_tau;  // of gumbel
  float commitment;   // weight of the loss's pull on the weight, in the hard modes
};

RS_HD Range range_of(const float* centers, int count) {
  float low = centers[0], high = centers[0];
  for (int k = 1; k < count; ++k) {
    low = centers[k] < low ? centers[k] : low;
    high = centers[k] > high ? centers[k] : high;
  }
  // The neighbours of the outer levels; of equal levels there is no step.
  float second = high, last = low;
  bool low_seen = false, high_seen = false;
  for (int k = 0; k < count; ++k) {
    const float c = centers[k];
    if (c == low && !low_seen)
      low_seen = true;
    else
      second = c < second ? c : second;
    if (c == high && !high_seen)
      high_seen = true;
    else
      last = c > last ? c : last;
  }
  const float low_step = second - low, high_step = high - last;
  return {add(low, -mul(0.5f, low_step)), add(high, mul(0.5f, high_step)), low_step, high_step};
}

// e^x for x in [-87, 0]: relative error below 1e-7. Moshier's polynomial (Cephes expf).
RS_HD float exp_negative(float x) {
  constexpr float kLog2e = 1.44269504088896341f, kRound = 12582912.0f;  // 1.5 * 2^23
  const float shifted = add(mul(x, kLog2e), kRound), n = add(shifted, -kRound);
  const float r = add(add(x, mul(n, -0.693359375f)), mul(n, 2.12194440e-4f));
  float p = 1.9875691500e-4f;
  p = add(mul(p, r), 1.3981999507e-3f);
  p = add(mul(p, r), 8.3334519073e-3f);
  p = add(mul(p, r), 4.1665795894e-2f);
  p = add(mul(p, r), 1.6666665459e-1f);
  p = add(mul(p, r), 5.0000001201e-1f);
  p = add(add(mul(mul(p, r), r), r), 1.0f);
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits + 127) << 23;  // 2^n: the low bits of `shifted` hold n
  float power;
  std::memcpy(&power, &bits, 4);
  return mul(p, power);
}

// exp((e^2 - (e - delta)^2) / tau): the weight of a level in the softmax relative to the nearest,
// which is `delta` below it and `e` below u. No square of u, so nothing overflows or cancels.
RS_HD float odds(float e, float delta, float inverse_tau) {
  const float excess = mul(mul(delta, add(delta, mul(-2.0f, e))), inverse_tau);
  const float bounded = excess < 0.0f ? 0.0f : excess > 87.0f ? 87.0f : excess;
  return exp_negative(-bounded);
}

// df/du of the hard modes.
RS_HD float slope(float u, const Range& range, Mode mode) {
  const float below = add(range.low, -u), above = add(u, -range.high);
  if (mode != Mode::attenuated) return below <= 0.0f && above <= 0.0f ? 1.0f : 0.0f;
  constexpr float kTiny = 1.17549435e-38f;
  const float a = below / (range.low_step > kTiny ? range.low_step : kTiny);
  const float b = above / (range.high_step > kTiny ? range.high_step : kTiny);
  const float distance = mul(10.0f, a > b ? a : b);
  return exp_negative(-(distance < 0.0f ? 0.0f : distance > 87.0f ? 87.0f : distance));
}

// What one weight gives in the backward pass, for g = dLoss/d(scale * f) and pull = 2 *
// dLoss/d(loss) / weights times the quantization error.
struct Gradients {
  float weight, scale, level;  // level: what reaches f from g and the loss
};

RS_HD Gradients soft_gradients(float g, float pull, float u, float f, float slope) {
  const float level = add(g, -pull);
  return {add(mul(level, slope), pull), mul(level, add(f, -mul(u, slope))), level};
}

RS_HD Gradients hard_gradients(float g, float pull, float u, float f, float slope,
                               float commitment) {
  return {add(mul(g, slope), mul(commitment, pull)),
          add(mul(g, add(f, -mul(u, slope))), -mul(pull, f)), add(g, -pull)};
}

// The derivative of f with respect to a level of probability (or odds, to scale) p: `delta` and
// `mean` are the level and f, both less the nearest level.
RS_HD float level_derivative(float p, float e, float delta, float mean, float inverse_tau) {
  const float tilt = mul(mul(2.0f, inverse_tau), mul(add(e, -delta), add(delta, -mean)));
  return mul(p, add(1.0f, tilt));
}

}  // namespace rs::qat
