// Cosine and sine of rational turns in float64 by fixed IEEE operations: the same bits on every
// device and in reality_stone/codecs/trig.py, which a math library does not promise. Absolute error
// below 2e-16.
#pragma once

#include "hd.h"

namespace rs {

// Taylor series of cos x and sin x / x in powers of x^2.
RS_TABLE double kCosineSeries[9] = {1.0,
                                    -1.0 / 2,
                                    1.0 / 24,
                                    -1.0 / 720,
                                    1.0 / 40320,
                                    -1.0 / 3628800,
                                    1.0 / 479001600,
                                    -1.0 / 87178291200.0,
                                    1.0 / 20922789888000.0};
RS_TABLE double kSineSeries[9] = {1.0,
                                  -1.0 / 6,
                                  1.0 / 120,
                                  -1.0 / 5040,
                                  1.0 / 362880,
                                  -1.0 / 39916800,
                                  1.0 / 6227020800.0,
                                  -1.0 / 1307674368000.0,
                                  1.0 / 355687428096000.0};

RS_HD double power_series(const double (&c)[9], double y) {
  double sum = c[8];
  for (int n = 7; n >= 0; --n) sum = add(mul(sum, y), c[n]);
  return sum;
}

// cos and sin of a small angle, at most pi/4 in magnitude.
RS_HD double small_cosine(double x) { return power_series(kCosineSeries, mul(x, x)); }
RS_HD double small_sine(double x) { return mul(power_series(kSineSeries, mul(x, x)), x); }

// cos(2 pi k / n) for n a multiple of 4, at most 2^60.
RS_HD double turn_cosine(uint64_t k, uint64_t n) {
  k %= n;
  if (2 * k > n) k = n - k;
  const bool negative = 4 * k > n;
  if (negative) k = n / 2 - k;
  const double unit = 6.283185307179586 / static_cast<double>(n);
  const double value = 8 * k > n ? small_sine(mul(static_cast<double>(n / 4 - k), unit))
                                 : small_cosine(mul(static_cast<double>(k), unit));
  return negative ? -value : value;
}
RS_HD double turn_sine(uint64_t k, uint64_t n) { return turn_cosine(k % n + n - n / 4, n); }

}  // namespace rs
