// Indices into a codebook of free values, of the layer or of each group of a row.
//
//   layout=dense   bits 1 to 4: code j is `bits` bits from bit bits*j on, least significant first
//                  tile 1 x 8, 4, 8, 2 in 1, 1, 3, 1 bytes; with groups 1 x group, padded to a byte
//                  with zero bits
//   layout=words   uint16, little-endian; tile 1 x 5 in 2 bytes, with groups 1 x group
//     bit   15  14  12  11   9  8    6  5    3  2    0
//          | 0 | code 4 | code 3 | code 2 | code 1 | code 0 |     3.2 bits a weight
//   layout=pair    a code of 5 bits for two weights: tile 1 x 16 in 5 bytes, codes as in dense
//
//   w = codebook[code];   pair: (w_2j, w_2j+1) = codebook[code_j]
//
// Params: codebook (2^bits) or (32, 2), shared, and out_scale (out), the frame; with groups only
// codebook (out, in/group, 2^bits), sliced with the tiles.
#pragma once

#include "../codec.h"
#include "../hd.h"

namespace rs {

enum class PaletteLayout { dense, words, pair };

template <int Bits>
struct DenseIndex {
  static constexpr int kEntries = 1 << Bits, kUnit = 1;
  RS_HD static uint32_t read(const uint8_t* tile, int j) {
    return read_bits<Bits>(tile, static_cast<int64_t>(j) * Bits);
  }
  RS_HD static void write(uint8_t* tile, int64_t j, uint32_t code) {
    write_bits<Bits>(tile, j * Bits, code);
  }
};

struct WordIndex {
  static constexpr int kEntries = 8, kUnit = 1;
  RS_HD static uint32_t read(const uint8_t* tile, int j) {
    return read_bits<3>(tile, j / 5 * 16 + j % 5 * 3);
  }
  RS_HD static void write(uint8_t* tile, int64_t j, uint32_t code) {
    write_bits<3>(tile, j / 5 * 16 + j % 5 * 3, code);
  }
};

struct PairIndex {
  static constexpr int kEntries = 32, kUnit = 2;
  RS_HD static uint32_t read(const uint8_t* tile, int j) {
    return read_bits<5>(tile, static_cast<int64_t>(j) * 5);
  }
  RS_HD static void write(uint8_t* tile, int64_t j, uint32_t code) {
    write_bits<5>(tile, j * 5, code);
  }
};

template <class Index, bool Grouped>
struct Palette {
  static constexpr int kUnit = Index::kUnit;
  static constexpr int kValues = Index::kEntries * kUnit;  // of one codebook
  enum Param { kCodebook, kOutScale };

  struct Tables {
    const float* codebook;
    int64_t groups;
    template <class L>
    RS_HD explicit Tables(const L& layer)
        : codebook(layer.params[kCodebook]), groups(layer.tile_cols()) {}
  };
  // Shared sums: the gradient of the shared codebook.
  static constexpr int kSums = Grouped ? 0 : kValues, kGain = 1, kFolds = kSums;
  RS_HD static void fold(int i, const Tables&, const double* sum, float* const* grads) {
    if (grads[kCodebook]) grads[kCodebook][i] += static_cast<float>(sum[i]);
  }

  RS_HD static int64_t first_value(int64_t row, int64_t col, const Tables& t) {
    return Grouped ? (row * t.groups + col) * kValues : 0;
  }
  RS_HD static void decode(const uint8_t* tile, int64_t row, int64_t col, int unit, const Tables& t,
                           float* w) {
    const float* entry = t.codebook + first_value(row, col, t) + Index::read(tile, unit) * kUnit;
    for (int k = 0; k < kUnit; ++k) w[k] = entry[k];
  }
  template <class Sums>
  RS_HD static void adjoint(const uint8_t* tile, int64_t row, int64_t col, int unit,
                            const Tables& t, const float* dw, Sums& sums) {
    const int64_t at = first_value(row, col, t) + Index::read(tile, unit) * kUnit;
    for (int k = 0; k < kUnit; ++k) {
      if constexpr (Grouped)
        sums.own(kCodebook, at + k, dw[k]);
      else
        sums.shared(at + k, dw[k]);
    }
  }
};

// spec: palette(layout=dense|words|pair, bits=3, group=0)
std::vector<Term> palette_terms(const Spec& spec, Shape shape);

}  // namespace rs
