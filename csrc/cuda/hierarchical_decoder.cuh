// The eight weights of a base are one of four values each: these are made first, and then chosen
// by their bytes.
#pragma once

#include "../codecs/hierarchical.h"
#include "pairs.cuh"

namespace rs::cuda {

// The four values that a base gives, for MulMode.
struct MulValues {
  static constexpr int kTableBytes = 0;
  float multipliers[4];

  static __device__ void fill(const LayerView&, uint32_t*) {}
  __device__ MulValues(const LayerView& layer, const uint32_t*) {
#pragma unroll
    for (int i = 0; i < 4; ++i) multipliers[i] = layer.params[0][i] * (1.0f / 512);
  }
  __device__ void operator()(uint32_t base, float (&values)[4]) const {
    const float factor = static_cast<float>(static_cast<int16_t>(base));
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = factor * multipliers[i];
  }
};

// For XorMode: the table holds the sixteen levels, then T over 8192.
struct XorValues {
  static constexpr int kTableBytes = 128;
  const float* table;

  static __device__ void fill(const LayerView& layer, uint32_t* table) {
    const int i = threadIdx.x;
    if (i < 16)
      table[i] = std::bit_cast<uint32_t>(layer.params[0][i]);
    else if (i < 32)
      table[i] = std::bit_cast<uint32_t>(static_cast<float>(kCyclic[0][i - 16]) * (1.0f / 8192));
  }
  __device__ XorValues(const LayerView&, const uint32_t* table)
      : table(reinterpret_cast<const float*>(table)) {}

  __device__ float wave(uint32_t code) const {
    return table[16 + (((code >> 12) + (code >> 8 & 12)) & 15)];
  }
  static __device__ float amplitude(uint32_t code) {
    return static_cast<float>((code >> 4 & 63) + 1);
  }
  // Masks 0x00F0 and 0x00FF leave the wave as it is, and 0x00F0 and 0x0F00 the level.
  __device__ void operator()(uint32_t base, float (&values)[4]) const {
    const float level = table[base & 15], wave_level = wave(base) * level;
    const float low = amplitude(base ^ 0x00F0);
    values[0] = amplitude(base) * wave_level;
    values[1] = low * wave_level;
    values[2] = amplitude(base ^ 0x0F00) * (wave(base ^ 0x0F00) * level);
    values[3] = low * (wave(base) * table[~base & 15]);
  }
};

template <class T, class Values>
struct HierarchicalDecoder {
  static constexpr int kRun = 8, kRunBytes = 4, kRead = 4, kScales = 0;
  static constexpr float kShift = 0;
  static constexpr int kTableBytes = Values::kTableBytes;

  Values four;

  static __device__ void fill(const LayerView& layer, uint32_t* table) {
    Values::fill(layer, table);
  }
  __device__ HierarchicalDecoder(const LayerView& layer, const uint32_t* table)
      : four(layer, table) {}

  // Weights 0 and 4, 1 and 5, 2 and 6, 3 and 7: their deltas stand eight bits apart.
  __device__ void decode(const unsigned char* strip, int t, uint32_t (&pairs)[4]) const {
    const uint32_t tile = reinterpret_cast<const uint32_t*>(strip)[t];
    float values[4];
    four(tile & 0xFFFF, values);
    const uint32_t low = pack_pair<T>(values[0], values[1]);
    const uint32_t high = pack_pair<T>(values[2], values[3]);
#pragma unroll
    for (int i = 0; i < 4; ++i)  // value d is bytes 2 d and 2 d + 1 of the two registers
      pairs[i] = permute_bytes(low, high, (tile >> (16 + 2 * i) & 0x0303) * 0x22 + 0x1010);
  }
  static __device__ uint4 arrange(const uint4& x) {
    return make_uint4(permute_bytes(x.x, x.z, 0x5410), permute_bytes(x.x, x.z, 0x7632),
                      permute_bytes(x.y, x.w, 0x5410), permute_bytes(x.y, x.w, 0x7632));
  }
};

}  // namespace rs::cuda
