// Derivatives of codes by their phase, from tables alone. No torch header.
//
// A code is an amplitude times a function of a phase, and its diff says which derivative of the
// function it means already, so that one more is one more row of a table with four rows:
//
//   value = (T[family][(diff + order) mod 4][phase * step] * (amp + plus)) >> shift      int16
//
// with >> the arithmetic shift. The first row of kBitLayouts is the documents' own code
//     31    24  23  22  21       8  7     0
//    | phase8 | diff2 |  not read  | amp8 |      phase index = phase8 >> 4
// the others are the words of codecs/cyclic.h and cyclic_scalar.h. Those with int8 tables are not
// shifted: their value is the integer `level` that the codec multiplies its vectors with. The
// int16 tables give a result in the tables' unit, 1/32767.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "codecs/cyclic_tables.h"
#include "hd.h"

namespace rs {

// All tables in a row; a layout's starts at `first`.
struct BitTables {
  static constexpr int kByte = 0, kShort = 64, kFine = kShort + 256, kScalar = kFine + 1024,
                       kSize = kScalar + 256;
  int16_t at[kSize]{};
  constexpr BitTables() {
    for (int d = 0; d < 4; ++d) {
      for (int p = 0; p < 16; ++p) at[kByte + 16 * d + p] = kCyclic[d][p];
      for (int p = 0; p < 64; ++p) at[kShort + 64 * d + p] = kCyclic16.at[d][p];
      for (int p = 0; p < 256; ++p) at[kFine + 256 * d + p] = kCyclic256.at[d][p];
    }
    for (int i = 0; i < 256; ++i) at[kScalar + i] = kCyclicScalar[i / 64][i / 16 % 4][i % 16];
  }
};

struct BitField {
  int at, mask;
};

struct BitLayout {
  char name[24];
  int first, phases;  // of the table: where it starts, columns of a row
  BitField phase;
  int step;  // columns per phase
  BitField diff, family, amp;
  int plus, shift;

  // Values of the layout's table.
  RS_HD int size() const { return (family.mask + 1) * 4 * phases; }
};

inline constexpr BitField kNoField{0, 0};
inline constexpr BitLayout kBitLayouts[] = {
    {"documents", BitTables::kByte, 16, {28, 15}, 1, {22, 3}, kNoField, {0, 255}, 0, 7},
    {"documents_fine", BitTables::kShort, 64, {26, 63}, 1, {22, 3}, kNoField, {0, 255}, 0, 8},
    {"cyclic_32", BitTables::kByte, 16, {28, 15}, 1, {26, 3}, kNoField, {8, 255}, 0, 0},
    {"cyclic_32_fine", BitTables::kShort, 64, {28, 15}, 4, {26, 3}, kNoField, {8, 255}, 0, 8},
    {"cyclic_16", BitTables::kByte, 16, {12, 15}, 1, kNoField, kNoField, {0, 15}, 0, 0},
    {"cyclic_16_fine", BitTables::kShort, 64, {12, 15}, 4, kNoField, kNoField, {0, 15}, 0, 4},
    {"cyclic_compound", BitTables::kByte, 16, {12, 15}, 1, {10, 3}, kNoField, {4, 63}, 0, 0},
    {"cyclic_compound_fine", BitTables::kShort, 64, {12, 15}, 4, {10, 3}, kNoField, {4, 63}, 0, 6},
    {"cyclic_scalar_8", BitTables::kScalar, 16, {0, 15}, 1, {4, 3}, {6, 3}, kNoField, 1, 0},
    {"cyclic_scalar_16", BitTables::kFine, 256, {0, 255}, 1, {8, 3}, kNoField, {10, 63}, 1, 6},
};

RS_HD int bits_of(uint32_t code, BitField field) {
  return static_cast<int>(code >> field.at) & field.mask;
}

// `table` holds the size() values of the layout.
template <class T>
RS_HD int16_t bit_value(const BitLayout& layout, const T* table, int32_t signed_code, int order) {
  const auto code = static_cast<uint32_t>(signed_code);
  const int row = 4 * bits_of(code, layout.family) + ((bits_of(code, layout.diff) + order) & 3);
  const int32_t value = table[row * layout.phases + layout.step * bits_of(code, layout.phase)];
  return static_cast<int16_t>(value * (bits_of(code, layout.amp) + layout.plus) >> layout.shift);
}

// Null where there is none of this name.
const BitLayout* bit_layout(std::string_view name);
std::string bit_layout_names();

}  // namespace rs
