// The direct product of `cyclic`: dot products of every block of x with the basis once, then a
// lookup and a multiply-add per code. Sums are exact integers, so threads and instruction sets
// change no bit of them.
//
//   activation=float  the dot products are held to 16 bits, one unit per row of x
//   activation=int8   x (per row) and the basis are held to 8 bits and the dot products are exact:
//                     y = fl32(sum * unit) for the integer sum and, in float64,
//                     unit = unit of x * unit of the basis / 2^kShift
//                     The gradient to the input is the same with dL/dy, out_scale applied, for x.
#pragma once

#include "../codecs/cyclic.h"
#include "isa.h"

namespace rs {

// Dot products of 16 bits are at most this in magnitude.
constexpr int kCyclicTop = 32512;
constexpr int64_t kCyclicStrip = 32;  // tables go on with zeros up to a multiple of so many columns

// A table holds the dot products of up to so many rows of x, apart, [row][column][vector], or side
// by side, [column][vector][lane]: of 8, 16 or 32 rows, row b in the lane to which unpacking
// neighbouring columns' words and adding them in pairs returns it.
constexpr int kCyclicMostLanes = 32;
constexpr int cyclic_lane(int b, int lanes) {
  const int half = lanes / 2, at = b % half;
  return 4 * (2 * (at / 4) + b / half) + at % 4;
}

// sums[r * lanes + b] = sum over columns c of
//     level(code) * dot product of row b's column c and vector index(code), from the table
// for the codes of row r at codes + r * row_bytes.
using CyclicSums = void (*)(const uint8_t* codes, int64_t row_bytes, int64_t rows, int64_t columns,
                            const int16_t* table, int lanes, int64_t* sums);
struct CyclicKernel {
  CyclicSums sums;
  int lanes;   // rows of x, at most
  bool apart;  // the table's order
};

// The kernel for the first rows of a batch.
template <class Word>
CyclicKernel cyclic_kernel_avx2(int64_t batch);
template <class Word>
CyclicKernel cyclic_kernel_avx512(int64_t batch);

// bins[bin[r]][lane] += level[r] * g[r][lane] for all rows r, kCyclicLanes of the batch at once.
constexpr int kCyclicLanes = 16;
using CyclicScatter = void (*)(const int16_t* level, const uint8_t* bin, const int8_t* g,
                               int64_t rows, int32_t* bins);
void cyclic_scatter_avx2(const int16_t* level, const uint8_t* bin, const int8_t* g, int64_t rows,
                         int32_t* bins);
void cyclic_scatter_avx512(const int16_t* level, const uint8_t* bin, const int8_t* g, int64_t rows,
                           int32_t* bins);

// decode of blocks of 4 and multiples of 8.
void cyclic_decode_avx2_slots(Cyclic16Word, Row& row);
void cyclic_decode_avx2_slots(CyclicCompoundWord, Row& row);
void cyclic_decode_avx2_slots(Cyclic32Word, Row& row);
// decode and decode_bf16 of blocks of 8.
void cyclic_decode_avx512_slots(Cyclic16Word, Row& row);
void cyclic_decode_avx512_slots(CyclicCompoundWord, Row& row);
void cyclic_decode_avx512_slots(Cyclic32Word, Row& row);

template <class Word>
void cyclic_product_slots(Row& row, bool integers, Isa isa);
template <class Word>
void cyclic_grad_input_slot(Row& row, Isa isa);

}  // namespace rs
