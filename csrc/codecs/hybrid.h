// A block as eight smooth functions plus the largest terms of the cosine transform of the rest.
//
//   tile      B x B (B a power of two, 8 to 256), K = terms; all little-endian
//   byte      0         16               16+2K
//           | c[0..7] | position[0..K) | value[0..K) |       float16, uint16, float16
//   c and value in units of 1/256: rows of unit mean square need no more than 256.
//   position u*B + v: frequency u down the rows, v across; rising. (Of other bytes the low bits
//   count, and a value repeated at a position adds up.) Float16 infinities and NaNs read as zero.
//
//   s(i,j)  = sum over k of fl32(c[k] * b[k](i,j)), from +0 on, in order, each sum rounded
//   g[u][j] = sum over the entries of u of fl32(value * D[v][j]), the same way
//   t[.][j] = the transform of g[.][j] back by partial butterflies: for n = 2, 4, ..., B
//               odd[i] = sum over u = B/n * (1, 3, ..., n-1) of fl32(D[u][i] * g[u]), i < n/2
//               t'[i] = fl32(t[i] + odd[i]),  t'[n-1-i] = fl32(t[i] - odd[i])
//             from t[0] = fl32(D[0][0] * g[0])
//   w(i,j)  = fl32(s + t)
//
//   b = 1, rho, rho^2, rho^3, cos t, sin t, cos 2t, sin 2t in polar coordinates about the middle
//   of the block, the corner weights at rho = sqrt 2; D the orthonormal DCT-II.
//
// Params: out_scale (out), the frame.
#pragma once

#include <bit>
#include <cmath>
#include <memory>

#include "../codec.h"
#include "../hd.h"
#include "../trig.h"

namespace rs {

constexpr int kSmooth = 8;

// An entry of D: sqrt(power / side) times the cosine of turn / (4 side) turns. Row 0 is of power 1
// at turn 0; in row u, of power 2, D[u][i] is at turn (2i + 1) u.
RS_HD float hybrid_wave(int64_t turn, int power, int64_t side) {
  return static_cast<float>(
      mul(std::sqrt(static_cast<double>(power) / static_cast<double>(side)),
          turn_cosine(static_cast<uint64_t>(turn), static_cast<uint64_t>(4 * side))));
}

// All b[k](i,j). The side is even, so no weight sits at rho = 0.
RS_HD void hybrid_functions(int64_t i, int64_t j, int64_t side, float* b) {
  const double last = static_cast<double>(side - 1),
               y = static_cast<double>(2 * i - (side - 1)) / last,
               x = static_cast<double>(2 * j - (side - 1)) / last;
  const double square = add(mul(x, x), mul(y, y)), rho = std::sqrt(square);
  b[0] = 1.0f;
  b[1] = static_cast<float>(rho);
  b[2] = static_cast<float>(square);
  b[3] = static_cast<float>(mul(rho, square));
  b[4] = static_cast<float>(x / rho);
  b[5] = static_cast<float>(y / rho);
  b[6] = static_cast<float>(add(mul(x, x), -mul(y, y)) / square);
  b[7] = static_cast<float>(mul(mul(2.0, x), y) / square);
}

// Tables of a block size, made once and kept.
struct HybridTables {
  int64_t side;
  std::unique_ptr<float[]> cosine;  // D [u][i]
  std::unique_ptr<float[]> smooth;  // b [k][i][j]
  explicit HybridTables(int64_t side);
  const float* wave(int64_t u) const { return cosine.get() + u * side; }
  static const HybridTables& get(int64_t side);
};

// Float16 bits in units of 1/256 as float; infinities and NaNs as zero.
RS_HD float half_value(uint32_t bits) {
  const uint32_t exponent = bits & 0x7C00, size = (bits & 0x7FFF) << 13;
  // Float16's denormals as a difference of normal numbers: float32's own would be slow.
  const float denormal = add(std::bit_cast<float>(size + (113u << 23)), -0x1p-14f);
  const float normal = std::bit_cast<float>(size + (112u << 23));
  const float any = exponent == 0 ? denormal : exponent == 0x7C00 ? 0.0f : normal;
  return mul(bits & 0x8000 ? -any : any, 0x1p-8f);
}
// Nearest float16 bits, the largest finite ones beyond their range.
inline uint16_t half_bits(float x) {
  uint32_t bits = std::bit_cast<uint32_t>((x < 0 ? -x : x) * 0x1p-104f);
  bits = (bits + 0x0FFFu + ((bits >> 13) & 1)) >> 13;
  return static_cast<uint16_t>((bits < 0x7BFF ? bits : 0x7BFF) | (x < 0 ? 0x8000 : 0));
}

// Width of a block's scratch, in whole vectors.
constexpr int64_t kHybridLanes = 16;
inline int64_t hybrid_width(int64_t side) { return side > kHybridLanes ? side : kHybridLanes; }

// The three steps of decode. g is side * hybrid_width(side) floats: g of the entries, then t in its
// place, then w, whose rows are `stride` apart, as s + t, or s alone for null.
void hybrid_spread(const HybridTables& tables, const uint16_t* position, const float* value,
                   int64_t terms, float* g);
void hybrid_waves(const HybridTables& tables, float* g);
void hybrid_smooth(const HybridTables& tables, const float* coefficients, const float* t, float* w,
                   int64_t stride);

// spec: hybrid(block=64, terms=252)
std::vector<Term> hybrid_terms(const Spec& spec, Shape shape);

void hybrid_encode(const Layer& layer, const float* w, const EncodeOptions& options, int64_t tile0,
                   int64_t tile1, uint8_t* codes, float* const* params);

}  // namespace rs
