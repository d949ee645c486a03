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

// Entries of a table of dot products are at most this in magnitude. With 8 bits to split off, the
// upper part is still a byte.
constexpr int kCyclicTop = 32512;

// sums[b * rows + r] = sum over columns c of level(code) * tables[b][c * kVectors + index(code)]
// for the codes of row r at codes + r * row_bytes. Tables go on with zeros up to a multiple of 32
// columns.
using CyclicSums = void (*)(const uint8_t* codes, int64_t row_bytes, int64_t rows, int64_t columns,
                            const int16_t* const* tables, int64_t batch, int64_t* sums);

// One for each word, told apart by the tag.
#define RS_CYCLIC_SUMS(isa, Word)                                                      \
  void cyclic_sums_##isa(Word, const uint8_t* codes, int64_t row_bytes, int64_t rows,  \
                         int64_t columns, const int16_t* const* tables, int64_t batch, \
                         int64_t* sums)
RS_CYCLIC_SUMS(avx2, Cyclic16Word);
RS_CYCLIC_SUMS(avx2, CyclicCompoundWord);
RS_CYCLIC_SUMS(avx2, Cyclic32Word);
RS_CYCLIC_SUMS(avx512, Cyclic16Word);
RS_CYCLIC_SUMS(avx512, CyclicCompoundWord);
RS_CYCLIC_SUMS(avx512, Cyclic32Word);

// bins[bin[r]][lane] += level[r] * g[r][lane] for all rows r, kCyclicLanes of the batch at once.
constexpr int kCyclicLanes = 16;
using CyclicScatter = void (*)(const int16_t* level, const uint8_t* bin, const int8_t* g,
                               int64_t rows, int32_t* bins);
void cyclic_scatter_avx2(const int16_t* level, const uint8_t* bin, const int8_t* g, int64_t rows,
                         int32_t* bins);
void cyclic_scatter_avx512(const int16_t* level, const uint8_t* bin, const int8_t* g, int64_t rows,
                           int32_t* bins);

// decode and decode_bf16 of blocks of 8.
void cyclic_decode_avx512_slots(Cyclic16Word, Row& row);
void cyclic_decode_avx512_slots(CyclicCompoundWord, Row& row);
void cyclic_decode_avx512_slots(Cyclic32Word, Row& row);

template <class Word>
void cyclic_product_slots(Row& row, bool integers, Isa isa);

}  // namespace rs
