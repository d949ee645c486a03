// A block of weights along one of 256 basis vectors, its length a function of a radius.
//
//   word 22, tile 1 x 4*block weights, 11 bytes (+ 4 fractions): code k from bit 22*k on, least
//   significant bit first, so a row is padded to whole tiles
//      21  20 19  18 17        10 9   8 7         0
//     | cat  | sub  |    idx     |  d  |    amp    |
//   word 32, tile 1 x block weights, 4 bytes
//      31      24 23  22 21  20 19        12  11    10  9        2 1    0
//     |  phase   | cat  | sub  |    idx     | sign | d |   amp    | fine |
//
//   T = fl32(f * basis[idx])                              f = table entry of (cat, sub, d, amp)
//   T = fl32(fl32(f * cosine[phase]) * basis[idx])        f of (cat, sub, sign, d, 4*amp + fine)
//   cosine[p] = fl32(cos(2 pi p / 256)); tables of f in radial.h
//
//   amplitude=uint16 or float32 (word 22): a fraction t in [0, 1] per code follows the codes
//   (little endian, in their order; uint16 in units of 2^-16), and f lies between two entries:
//     f = fl32(e[amp] + fl32(t * fl32(e[amp + 1] - e[amp])))       e[256] = e[255]
//   A float32 fraction outside [0, 1] counts as the nearer end, NaN as 0.
//
// Params: basis (256, block), r_max (1), shared; out_scale (out), the frame. The settings basis,
// functions and r_max say how to encode; decode reads any code.
#pragma once

#include <array>
#include <bit>
#include <cstring>
#include <memory>

#include "../codec.h"
#include "../hd.h"
#include "radial.h"

namespace rs {

constexpr int kBasis = 256;

enum class Amplitude { byte, uint16, float32 };

// What a spec says.
struct BitfieldSettings {
  int word;
  Amplitude amplitude;
  int64_t block;
  uint64_t functions;  // bit 16*cat + 4*sub + d: the encoder may use it
};
BitfieldSettings bitfield_settings(const Spec& spec);

// fl32(cos(2 pi p / 256))
const std::array<float, 256>& bitfield_cosines();

template <int Word, Amplitude Width>
struct Bitfield {
  static_assert(Word == 32 ? Width == Amplitude::byte : Word == 22);
  enum Param { kBasisParam, kRMax, kOutScale };
  static constexpr int kCodes = Word == 22 ? 4 : 1;  // per tile
  static constexpr int kCodeBytes = Word == 22 ? 11 : 4;
  static constexpr int kWidth = Width == Amplitude::byte ? 0 : Width == Amplitude::uint16 ? 2 : 4;
  static constexpr int kBytes = kCodeBytes + kCodes * kWidth;

  // First byte of the four that hold code k. The fourth of a tile ends with it: its window starts a
  // byte early.
  RS_HD static constexpr int window(int k) { return Word == 32 ? 0 : k == 3 ? 7 : 22 * k / 8; }
  RS_HD static uint32_t code(const uint8_t* tile, int k) {
    uint32_t bits;
    std::memcpy(&bits, tile + window(k), 4);
    if constexpr (Word == 32) return bits;
    return bits >> (22 * k - 8 * window(k)) & 0x3FFFFF;
  }
  // Into a tile whose code k is zero.
  static void put(uint8_t* tile, int k, uint32_t code) {
    uint32_t bits;
    std::memcpy(&bits, tile + window(k), 4);
    bits |= code << (22 * k - 8 * window(k)) * (Word == 22);
    std::memcpy(tile + window(k), &bits, 4);
  }

  RS_HD static uint32_t index(uint32_t code) { return code >> (Word == 22 ? 10 : 12) & 255; }
  RS_HD static uint32_t phase(uint32_t code) { return Word == 22 ? 0 : code >> 24; }
  RS_HD static uint32_t entry(uint32_t code) {
    return Word == 22 ? (code >> 8 & 0x3C00) | (code & 0x3FF)
                      : (code >> 8 & 0xF000) | (code & 0xFFF);
  }
  static uint32_t code_of(uint32_t entry, uint32_t index, uint32_t phase) {
    if constexpr (Word == 22) return (entry & 0x3C00) << 8 | index << 10 | (entry & 0x3FF);
    return phase << 24 | (entry & 0xF000) << 8 | index << 12 | (entry & 0xFFF);
  }
  // Number of the function of a table entry.
  static int function(uint32_t entry) {
    return static_cast<int>(Word == 22 ? entry >> 8 : (entry >> 12) * 4 + (entry >> 10 & 1));
  }

  static uint8_t* fraction_at(uint8_t* tile, int k) { return tile + kCodeBytes + k * kWidth; }
  RS_HD static float stored_fraction(const uint8_t* tile, int k) {
    const uint8_t* at = tile + kCodeBytes + k * kWidth;
    if constexpr (Width == Amplitude::uint16) {
      uint16_t t;
      std::memcpy(&t, at, sizeof t);
      return t * 0x1p-16f;
    } else {
      float t;
      std::memcpy(&t, at, sizeof t);
      return t;
    }
  }

  RS_HD static float interpolate(float t, uint32_t at, const float* table) {
    const float low = t > 0 ? t : 0.0f, held = low < 1 ? low : 1.0f;
    const uint32_t next = at + ((at & 255) < 255);
    return add(table[at], mul(held, add(table[next], -table[at])));
  }

  struct Tables {
    std::shared_ptr<const RadialTable> radial;
    const float *value, *slope, *cosine, *basis;
    bool trains_r_max;  // inside the range it is held to
    explicit Tables(const Layer& layer)
        : radial(radial_table(Word, layer.params[kRMax][0])),
          value(radial->value.data()),
          slope(radial->slope.data()),
          cosine(bitfield_cosines().data()),
          basis(layer.params[kBasisParam]),
          trains_r_max(layer.params[kRMax][0] > kLeastRadius &&
                       layer.params[kRMax][0] < kLargestRadius) {}
  };

  // The factor of code k's basis vector, from the table of values or of slopes.
  RS_HD static float factor(const uint8_t* tile, int k, uint32_t code, const float* table,
                            const float* cosine) {
    const uint32_t at = entry(code);
    if constexpr (Width != Amplitude::byte) return interpolate(stored_fraction(tile, k), at, table);
    return Word == 22 ? table[at] : mul(table[at], cosine[phase(code)]);
  }
};

// Codes of tiles for the least importance-weighted squared error; see bitfield_encode.cpp.
template <int Word, Amplitude Width>
void bitfield_encode(const Layer&, const float* w, const EncodeOptions&, int64_t tile0,
                     int64_t tile1, uint8_t* codes, float* const* params);

// spec: bitfield(word=22|32, amplitude=byte|uint16|float32, basis=kmeans|svd, block=8,
//                functions=all|poincare|...|c0s0d0_c1s2d3, r_max=0)
std::vector<Term> bitfield_terms(const Spec& spec, Shape shape);

}  // namespace rs
