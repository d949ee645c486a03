// The product of uniform codes in bytes: each lane of a register has a row of x of its own, so that
// a scale meets whole registers.
//
// Activations are one or two signed bytes, the limbs: x ~ (256 * high + low) * unit of the row, or
// low * unit of the row and piece. Codes, unsigned bytes, meet them in vpdpbusd. Of `rows` rows of
// x a step takes 4 * span columns:
//   values[(((piece * limbs + limb) * steps + step) * vectors + v) * 64 + lane * 4 + t]
//     limb      high before low
//     row       (v * 16 + lane) / span
//     column    (piece * steps + step) * 4 * span + lane % span * 4 + t
#pragma once

#include "../codec.h"
#include "integers.h"

namespace rs {

constexpr int kLimbTop = 127 * 256 + 127;
constexpr int kByteTop = 127;
constexpr int kNarrowRows = 8;     // of x, in one register; more rows take registers of their own
constexpr int kWideRows = 64;      // of x, in four registers
constexpr int kMostColumns = 256;  // of one sum: 256 * 255 * kLimbTop < 2^31

struct LimbActivations {
  int limbs;
  bool nibbles;  // columns of two steps are even ones before odd ones: codes that share bytes
  int64_t rows, piece, steps, vectors, span;  // piece: columns between two meetings with a scale
  int64_t summed;                             // columns of a sum
  Lines<int8_t> values;
  // For the zero points, of sum s: [s / span][vector][lane], s % span the lane's place in its row.
  Lines<float> sums;
  Lines<float> unit;  // two limbs: [row]; one: [piece][vector][lane]

  LimbActivations(int limbs, int64_t m, int64_t in, int64_t piece, int64_t summed)
      : limbs(limbs),
        nibbles(false),
        rows(m > kNarrowRows ? m : std::max<int64_t>(2, std::bit_ceil(static_cast<uint64_t>(m)))),
        piece(piece),
        steps(0),
        vectors((rows + 15) / 16),
        span(rows > kNarrowRows ? 1 : 16 / rows),
        summed(summed),
        values(limbs * in * vectors * 16 / span),
        sums(round_up(in / summed, 16) / span * vectors * 16),
        unit((limbs == 1 ? in / piece : 1) * vectors * 16) {
    steps = piece / (4 * span);
  }
};

// Columns of one unit of single bytes, and what a register of x holds at a time.
inline int64_t byte_piece(int64_t group) { return group % 64 ? 32 : 64; }
// The longest equal parts of a group that integers can sum.
inline int64_t wide_piece(int64_t group) {
  int64_t piece = kMostColumns;
  while (group % piece) piece -= 32;
  return piece;
}

// `count` codes, a multiple of 32, to bytes; fetches what lies `ahead` bytes behind them.
using UnpackBytes = void (*)(const uint8_t* codes, int64_t count, int64_t ahead, uint8_t* to);

struct LimbProduct {
  const Layer& layer;
  UnpackBytes unpack;
  const float* zero;  // of group g of row r at (r * groups + g) * zero_step
  int64_t zero_step;
  int bits;
  int64_t m;
  float* y;

  int64_t bytes(int64_t columns) const { return columns * bits / 8; }
};

// Rows [row0, row1) of codes with up to kNarrowRows rows of x, and with any number of them in
// chunks of kWideRows.
void uniform_narrow_avx512(const LimbProduct&, const LimbActivations&, int64_t row0, int64_t row1);
void uniform_wide_avx512(const LimbProduct&, const LimbActivations* chunks, int64_t row0,
                         int64_t row1);

// y[m * out] = x[m * in] @ T^T for groups of a multiple of 32 and any m.
void uniform_limbs_avx512(const Layer& layer, int bits, int limbs, const float* x, int64_t m,
                          float* y);

}  // namespace rs
