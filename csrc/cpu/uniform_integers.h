// Uniform codes in integers: activations of their product, for all instruction sets.
#pragma once

#include <vector>

#include "../codecs/uniform.h"
#include "integers.h"

namespace rs {

constexpr int kUniformTop = 32767;  // of activations: int16, one scale per row of x

// A block is the columns of 64 bytes of codes, seen as int16 words of 16 / view codes each. Codes
// of other widths than 2, 4 and 8 are first spread to bytes.
constexpr int uniform_view(int bits) { return bits == 2 || bits == 4 ? bits : 8; }
constexpr int uniform_block(int bits) { return 512 / uniform_view(bits); }

// 64 codes to bytes: quadword q gets bytes Bits * q on, and code i of it starts at bit Bits * i.
template <int Bits>
struct Spread {
  Bytes bytes{}, cut{};
  constexpr Spread() {
    for (int i = 0; i < 64; ++i) {
      bytes.at[i] = static_cast<uint8_t>(i % 8 < Bits ? Bits * (i / 8) + i % 8 : 0);
      cut.at[i] = static_cast<uint8_t>(Bits * (i % 8));
    }
  }
};
template <int Bits>
inline constexpr Spread<Bits> kSpread;

// Rows of x in the order of the codes: vector k of a block meets code k of every word.
//   values[((block * batch + row) * parts + k) * 32 + word]      parts = 16 / view
struct UniformActivations {
  int batch, parts;
  int64_t blocks, groups;
  Lines<int16_t> values;
  Lines<float> sums;      // [row][group, up to a multiple of 16]: for the zero points
  float unit[kMaxBatch];  // of the row's integers

  UniformActivations(const float* x, int64_t m, int64_t in, int view, int64_t group)
      : batch(static_cast<int>(std::bit_ceil(static_cast<uint64_t>(m)))),
        parts(16 / view),
        blocks((in * view + 511) / 512),
        groups(round_up(in / group, 16)),
        values(blocks * batch * parts * 32),
        sums(groups * batch) {
    std::vector<int16_t> q(static_cast<size_t>(blocks * parts * 32));
    for (int64_t b = 0; b < m; ++b) {
      const Quantum quantum(x + b * in, in, kUniformTop);
      unit[b] = quantum.unit;
      for (int64_t i = 0; i < in; ++i) q[static_cast<size_t>(i)] = quantum(x[b * in + i]);
      for (int64_t g = 0; g < in / group; ++g) {
        int64_t sum = 0;
        for (int64_t i = 0; i < group; ++i) sum += q[static_cast<size_t>(g * group + i)];
        sums[b * groups + g] = static_cast<float>(sum);
      }
      for (int64_t block = 0; block < blocks; ++block) {
        const int16_t* from = q.data() + block * parts * 32;
        int16_t* to = values.get() + (block * batch + b) * parts * 32;
        for (int k = 0; k < parts; ++k)
          for (int word = 0; word < 32; ++word) to[k * 32 + word] = from[word * parts + k];
      }
    }
  }
};

// Which scale each 32-bit lane of a block has, and how many blocks share one. Groups that do not
// fit blocks, or would overflow the integers, are taken as runs of 32 columns with the same scale.
struct UniformGroups {
  static constexpr int kMost = 64;  // blocks: 64 * 4 columns a lane * 255 * 32767 < 2^31

  int64_t group, repeat;  // columns per scale; copies of each of the layer's scales
  int64_t span;           // blocks per scale
  int per_block;          // scales per block
  alignas(64) int32_t lane[16];

  // A block is of 512 bits of codes, or what a narrower register takes.
  UniformGroups(int64_t layer_group, int view, int bits = 512) : group(layer_group) {
    const int64_t block = bits / view;
    if (block % group != 0 && (group % block != 0 || group / block > kMost)) group = 32;
    repeat = layer_group / group;
    span = std::max<int64_t>(group / block, 1);
    per_block = static_cast<int>(std::max<int64_t>(block / group, 1));
    for (int l = 0; l < 16; ++l) lane[l] = static_cast<int32_t>(l * (32 / view) / group);
  }
};

}  // namespace rs
