// The functions of radial.h at one radius with their derivatives, for host and device alike.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <utility>

#include "../hd.h"

namespace rs::radial {

// A number and its derivative to the radius. Quotients and products of these are the chain rule, so
// a function written once is also its analytic derivative. Nothing here calls a library function
// but sqrt, ldexp and frexp, which are exact.
struct Dual {
  double v, d;
  RS_HD constexpr Dual(double v, double d = 0) : v(v), d(d) {}
};
RS_HD constexpr Dual operator+(Dual a, Dual b) { return {a.v + b.v, a.d + b.d}; }
RS_HD constexpr Dual operator-(Dual a, Dual b) { return {a.v - b.v, a.d - b.d}; }
RS_HD constexpr Dual operator*(Dual a, Dual b) { return {a.v * b.v, a.d * b.v + a.v * b.d}; }
RS_HD constexpr Dual operator/(Dual a, Dual b) {
  const double v = a.v / b.v;
  return {v, (a.d - v * b.d) / b.v};
}

constexpr int kTerms = 28;  // enough for |y| <= 64 in every series below
using Series = std::array<double, kTerms>;

template <class T>
RS_HD T sum(const Series& c, T y) {
  T total = c[kTerms - 1];
  for (int n = kTerms - 2; n >= 0; --n) total = total * y + c[static_cast<size_t>(n)];
  return total;
}

// first, then each coefficient from the one before: c[n] = c[n-1] * top(n) / bottom(n).
template <class Ratio>
constexpr Series series(double first, Ratio ratio) {
  Series c{};
  c[0] = first;
  for (int n = 1; n < kTerms; ++n)
    c[static_cast<size_t>(n)] = c[static_cast<size_t>(n - 1)] / ratio(n);
  return c;
}

// Stumpff functions c_k(y) = sum y^n / (2n + k)!. They hold what is left of cosh and sinh after k
// powers of r, and of cos and sin at -y, without cancellation:
//   c0(r^2) = cosh r, c1 = sinh r / r, c2 = (cosh r - 1) / r^2, c3 = (sinh r - r) / r^3,
//   c4 = (cosh r - 1 - r^2/2) / r^4
template <int K>
constexpr Series stumpff_series() {
  double first = 1;
  for (int i = 2; i <= K; ++i) first /= i;
  return series(first, [](int n) { return double((2 * n + K - 1) * (2 * n + K)); });
}
template <int K, class T>
RS_HD T stumpff(T y) {
  static constexpr Series c = stumpff_series<K>();
  return sum(c, y);
}

RS_HD double exp(double x) {
  static constexpr Series c = series(1, [](int n) { return double(n); });
  const double k = std::floor(x * 1.4426950408889634 + 0.5);
  const double z = (x - k * 0.6931471803691238) - k * 1.9082149292705877e-10;
  return std::ldexp(sum(c, z), static_cast<int>(k));
}
RS_HD Dual exp(Dual x) {
  const double e = exp(x.v);
  return {e, e * x.d};
}

// cos x and sin x for |x| of some hundreds: less k quarter turns, of which the first part is exact.
RS_HD std::pair<double, double> turn(double x) {
  const double k = std::floor(x * 0.6366197723675814 + 0.5);
  const double z = (x - k * 1.5707963267341256) - k * 6.077100506506192e-11, y = z * z;
  const double c = stumpff<0>(-y), s = z * stumpff<1>(-y);
  switch (static_cast<int>(k) & 3) {
    case 0:
      return {c, s};
    case 1:
      return {-s, c};
    case 2:
      return {-c, -s};
  }
  return {s, -c};
}
RS_HD Dual cos(Dual x) {
  const auto [c, s] = turn(x.v);
  return {c, -s * x.d};
}
RS_HD Dual sin(Dual x) {
  const auto [c, s] = turn(x.v);
  return {s, c * x.d};
}

// sum y^n / (2n + 1): atanh(s) / s at s^2, atan(s) / s at -s^2, for |s| < 1/4.
template <class T>
RS_HD T odd_reciprocals(T y) {
  static constexpr Series c = [] {
    Series c{};
    for (int n = 0; n < kTerms; ++n) c[static_cast<size_t>(n)] = 1.0 / (2 * n + 1);
    return c;
  }();
  return sum(c, y);
}

// ln(1 + x) / x for x > -1.
RS_HD Dual log_over(Dual x) {
  if (std::abs(x.v) <= 0.25) {
    const Dual s = x / (2 + x);
    return 2 / (2 + x) * odd_reciprocals(s * s);
  }
  int exponent;
  double m = std::frexp(1 + x.v, &exponent);
  if (m < 0.7071067811865476) m = 2 * m, exponent = exponent - 1;
  const double s = (m - 1) / (m + 1);
  const double log = exponent * 0.6931471805599453 + 2 * s * odd_reciprocals(s * s);
  const double value = log / x.v;
  return {value, (1 / (1 + x.v) - value) / x.v * x.d};
}

RS_HD Dual atan(Dual x) {
  double t = x.v;  // three times the tangent of half the angle
  for (int i = 0; i < 3; ++i) t = t / (1 + std::sqrt(1 + t * t));
  return {8 * t * odd_reciprocals(-(t * t)), x.d / (1 + x.v * x.v)};
}

RS_HD Dual sqrt(Dual x) {
  const double root = std::sqrt(x.v);
  return {root, x.d / (2 * root)};
}

// sgn(x) sqrt|x|; its infinite slope at 0 is written 0, for there r is 0 whatever r_max is.
RS_HD Dual signed_sqrt(Dual x) {
  const double root = std::sqrt(std::abs(x.v));
  return {std::copysign(root, x.v), root > 0 ? x.d / (2 * root) : 0.0};
}

RS_HD Dual abs(Dual x) { return x.v < 0 ? Dual{-x.v, -x.d} : x; }

// A radius that stays where a function is tame, and stops there.
RS_HD Dual held(Dual r, double low, double high) {
  return r.v < low ? Dual{low} : r.v > high ? Dual{high} : r;
}

// tanh x for x >= 0
RS_HD Dual tanh_of_positive(Dual x) { return 1 - 2 / (exp(2 * x) + 1); }

constexpr int kFunctions = 64;

// All functions at one radius, |r| <= 8, in the order of their numbers. Where a formula is 0/0 at
// r = 0, a series takes its place that has the limit there.
RS_HD std::array<Dual, kFunctions> radial_functions(double radius) {
  static constexpr Series j0 = series(1, [](int n) { return -4.0 * n * n; });
  static constexpr Series j1 = series(0.5, [](int n) { return -4.0 * n * (n + 1); });
  const Dual r{radius, 1}, y = r * r, h = r / 2, yh = y / 4, q = r / 4, yq = y / 16;
  const Dual cosh = stumpff<0>(y), sinh_over = stumpff<1>(y), sinh = r * sinh_over;
  const Dual cosh1 = y * stumpff<2>(y);  // cosh r - 1
  const Dual cosine = stumpff<0>(0 - y), sin_over = stumpff<1>(0 - y), sine = r * sin_over;
  const Dual cosh_half = stumpff<0>(yh), sinh_half_over = stumpff<1>(yh),
             sinh_half = h * sinh_half_over;
  const Dual cos_half = stumpff<0>(0 - yh);
  const Dual tanh = sinh / cosh, tanh_half = sinh_half / cosh_half;
  const Dual tanh_quarter = q * stumpff<1>(yq) / stumpff<0>(yq);
  const Dual e = exp(r), grow_over = exp(h) * sinh_half_over;  // (e^r - 1) / r
  const Dual decay_over = exp(0 - h) * sinh_half_over;         // (1 - e^-r) / r
  const Dual bell = exp(0 - y / 2), wide_bell = exp(0 - y / 4), one_y = 1 + y;
  const Dual past = held(r, -0.75, 8);       // 1 + r has its zero at -1
  const Dual between = held(r, -0.5, 2.25);  // 1 + r - r^2/2 has its zeros at -0.73 and 2.73
  const Dual within = held(r, -1.5, 1.5), w = within * within;  // tan r has its poles at +-1.57
  const Dual inside = held(r, -3, 3), u = inside * inside;      // 1 / sin r at +-3.14
  const Dual bessel0 = sum(j0, y), bessel1_over = sum(j1, y);   // J0(r), J1(r) / r
  return {
      // Poincare
      tanh_half,
      0 - tanh_half,
      2 * tanh_quarter,
      tanh_half * tanh_half,
      sinh / (1 + cosh),
      cosh1 / (1 + cosh),
      tanh,
      sinh_over,
      sin_over,
      cosine,
      stumpff<2>(0 - y),
      sine * cosine,
      grow_over,
      e / (1 + e),
      log_over(past),
      r / (1 + abs(r)),
      // Lorentz
      sinh,
      cosh1,
      tanh,
      sinh / cosh,
      2 * sinh_half,
      cosh_half,
      r * grow_over,
      r * decay_over,
      r * cosh,
      r * sinh,
      r * stumpff<3>(y),
      r * stumpff<4>(y),
      sqrt(cosh),
      signed_sqrt(sinh),
      tanh_of_positive(y),
      sinh_over / cosh,
      // Klein
      past / (1 + past),
      r / sqrt(one_y),
      y / one_y,
      past / (1 + past),
      2 * r / one_y,
      (1 - y) / one_y,
      4 * r / (one_y * one_y),
      atan(r) * 0.6366197723675814,
      r / (1 + r + y / 2),
      between / (1 + between - between * between / 2),
      r - r * y / 3 + r * y * y / 5,
      r / (1 + y / 3),
      r / (1 + abs(r)),
      signed_sqrt(r),
      r * y / one_y,
      r * bell,
      // Special
      (bessel0 + r * bessel1_over) / 2,
      sin_over * cos_half,
      2 * bessel1_over,
      bessel0 * cosine,
      bell,
      r * bell,
      (1 - y) * bell,
      1 / sqrt(one_y),
      cosine * wide_bell,
      sine * wide_bell,
      cos(y),
      sin(y),
      stumpff<1>(0 - w) / stumpff<0>(0 - w),
      sin_over * cosine,
      stumpff<2>(0 - u) / stumpff<1>(0 - u),
      r * log_over(y),
  };
}

constexpr int kKinds = 16;  // of functions: category and subcategory

// Writes the entries of radius number n < radial_radii(word) and of kinds [First, Last) into a
// word's tables of values and slopes. r_max is held.
template <int First = 0, int Last = kKinds>
RS_HD void tabulate(int word, int n, float r_max, float* value, float* slope) {
  const bool both_signs = word == 32;
  const int top = both_signs ? 1023 : 255, sign = n > top, i = n - sign * (top + 1);
  const double r = i * static_cast<double>(r_max) / top, share = static_cast<double>(i) / top;
  const auto f = radial_functions(sign ? -r : r);
#pragma unroll
  for (int kind = First; kind < Last; ++kind)
#pragma unroll
    for (int order = 0; order < (both_signs ? 2 : 4); ++order) {
      const Dual& at = f[static_cast<size_t>(4 * kind + order)];
      const int row = both_signs ? 4 * kind + 2 * sign + order : 4 * kind + order;
      const int entry = row * (top + 1) + i;
      value[entry] = static_cast<float>(at.v);
      slope[entry] = static_cast<float>(at.d * (sign ? -share : share));
    }
}

}  // namespace rs::radial
