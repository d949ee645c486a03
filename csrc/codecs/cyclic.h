// Blocks of a row as multiples of a few vectors: a code is an index into a basis, and a phase and
// an amplitude that make the factor.
//
//   tile      1 x block weights, one word, little-endian:
//             word=16                 phase[15:12]              idx[11:4]   amp[3:0]
//             word=16, compound=True  phase[15:12] diff[11:10]  amp[9:4]    idx[3:0]
//             word=32                 phase[31:28] diff[27:26]  zero[25:16] amp[15:8]  idx[7:0]
//   level     T[diff][phase] * amp, an integer of at most 16 bits (T: cyclic_tables.h)
//   factor    level / 2048, / 8192 when compound, / 16384 with word=32: exact
//   weight    w_j = fl32(factor * basis[idx][j])
//
// The documents shift by 14 bits; 2048 and 8192 keep the largest factor of the shorter amplitudes
// at 0.93 and 0.98. Encoders write diff 0: (diff, phase) means what (0, phase + 4 diff) means.
//
// Params: basis (256, block), or (16, block) when compound, shared; out_scale (out), of the frame.
// block=0 stands for the whole row.
#pragma once

#include "../codec.h"
#include "../hd.h"
#include "cyclic_tables.h"

namespace rs {

struct Cyclic16Word {
  static constexpr int kBytes = 2, kVectors = 256, kAmps = 16, kShift = 11;
  static constexpr uint32_t kReserved = 0;
  RS_HD static int index(uint32_t w) { return w >> 4 & 255; }
  RS_HD static int turn(uint32_t w) { return w >> 12 & 15; }
  RS_HD static int amp(uint32_t w) { return w & 15; }
  static uint32_t pack(int phase, int index, int amp) {
    return static_cast<uint32_t>(phase << 12 | index << 4 | amp);
  }
};

struct CyclicCompoundWord {
  static constexpr int kBytes = 2, kVectors = 16, kAmps = 64, kShift = 13;
  static constexpr uint32_t kReserved = 0;
  RS_HD static int index(uint32_t w) { return w & 15; }
  RS_HD static int turn(uint32_t w) { return ((w >> 12) + 4 * (w >> 10 & 3)) & 15; }
  RS_HD static int amp(uint32_t w) { return w >> 4 & 63; }
  static uint32_t pack(int phase, int index, int amp) {
    return static_cast<uint32_t>(phase << 12 | amp << 4 | index);
  }
};

struct Cyclic32Word {
  static constexpr int kBytes = 4, kVectors = 256, kAmps = 256, kShift = 14;
  static constexpr uint32_t kReserved = 0x03FF0000;
  RS_HD static int index(uint32_t w) { return w & 255; }
  RS_HD static int turn(uint32_t w) { return ((w >> 28) + 4 * (w >> 26 & 3)) & 15; }
  RS_HD static int amp(uint32_t w) { return w >> 8 & 255; }
  static uint32_t pack(int phase, int index, int amp) {
    return static_cast<uint32_t>(phase) << 28 | static_cast<uint32_t>(amp << 8 | index);
  }
};

template <class Word>
RS_HD uint32_t cyclic_word(const uint8_t* bytes) {
  uint32_t word = bytes[0] | static_cast<uint32_t>(bytes[1]) << 8;
  if constexpr (Word::kBytes == 4)
    word |= static_cast<uint32_t>(bytes[2]) << 16 | static_cast<uint32_t>(bytes[3]) << 24;
  return word;
}
// turn is phase + 4 diff: where in row 0 of T the factor is.
template <class Word>
RS_HD int32_t cyclic_level(uint32_t word) {
  return kCyclic[0][Word::turn(word)] * Word::amp(word);
}

// Weights per code up to which dot products of bytes fit 32 bits, each of at most 127.
constexpr int64_t kCyclicLongestInteger = int64_t{1} << 17;

enum CyclicParam { kCyclicBasis, kCyclicOutScale };

// spec: cyclic(word=16, compound=False, activation=float, block=8)
std::vector<Term> cyclic_terms(const Spec& spec, Shape shape);

}  // namespace rs
