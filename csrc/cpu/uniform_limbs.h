// The product of uniform codes with many rows of x, in bytes: each lane of a register has a row of
// x of its own, so that a scale meets whole registers and nothing is reduced across lanes.
//
// Activations are two signed bytes, x ~ (256 * high + low) * unit of the row: codes, unsigned
// bytes, meet them in vpdpbusd. Of `rows` rows of x a step takes 4 * span columns:
//   values[(((piece * 2 + limb) * steps + step) * vectors + v) * 64 + lane * 4 + t]
//     limb      0 high, 1 low
//     row       (v * 16 + lane) / span
//     column    (piece * steps + step) * 4 * span + lane % span * 4 + t
#pragma once

#include "../codec.h"
#include "integers.h"

namespace rs {

constexpr int kLimbTop = 127 * 256 + 127;
constexpr int kNarrowRows = 8;     // of x, in one register; more rows take registers of their own
constexpr int kWideRows = 64;      // of x, in four registers
constexpr int kMostColumns = 256;  // of one scale: 256 * 255 * kLimbTop < 2^31

struct LimbActivations {
  int64_t rows, piece, steps, vectors, span;  // piece: columns between two meetings with a scale
  Lines<int8_t> values;
  Lines<float> sums;  // [piece][vector][lane]: for the zero points
  Lines<float> unit;  // of the rows' integers

  LimbActivations(int64_t m, int64_t in, int64_t piece)
      : rows(m > kNarrowRows ? m : std::max<int64_t>(2, std::bit_ceil(static_cast<uint64_t>(m)))),
        piece(piece),
        steps(0),
        vectors((rows + 15) / 16),
        span(rows > kNarrowRows ? 1 : 16 / rows),
        values(2 * in * vectors * 16 / span),
        sums(in / piece * vectors * 16),
        unit(vectors * 16) {
    steps = piece / (4 * span);
  }
};

// Columns a register of x holds at a time, of groups of a multiple of 32.
inline int64_t narrow_piece(int64_t group) { return group % 64 ? 32 : 64; }
// The longest equal parts of a group that integers can sum.
inline int64_t wide_piece(int64_t group) {
  int64_t piece = kMostColumns;
  while (group % piece) piece -= 32;
  return piece;
}

// y[m * out] = x[m * in] @ T^T for groups of a multiple of 32 and any m.
void uniform_limbs_avx512(const Layer& layer, int bits, const float* x, int64_t m, float* y);

}  // namespace rs
