// Integers of 4 and 8 bits as exact pairs of bfloat16 or float16, less their middle.
#pragma once

#include "../codecs/uniform.h"
#include "pairs.cuh"

namespace rs::cuda {

template <class T, int Bits, bool Symmetric>
struct UniformDecoder {
  static_assert(Bits == 4 || Bits == 8);
  static constexpr int kRun = 8, kRunBytes = Bits, kRead = Bits, kTableBytes = 0;
  static constexpr int kScales = Symmetric ? 1 : 2;
  static constexpr bool kBf16 = std::is_same_v<T, Bf16>;
  // Codes are decoded with this added, but 8 bits as bfloat16 less their middle.
  static constexpr float kPower = kBf16 ? 128 : 1024;
  static constexpr float kMiddle = 1 << (Bits - 1);
  static constexpr float kShift =
      (Bits == 8 && kBf16 ? kMiddle : -kPower) - (Symmetric ? kMiddle : 0);

  static __device__ void fill(const LayerView&, uint32_t*) {}
  __device__ UniformDecoder(const LayerView&, const uint32_t*) {}

  // 4 bits: codes 0 and 4, 1 and 5, 2 and 6, 3 and 7; 8 bits: 0 and 2, 1 and 3, 4 and 6, 5 and 7.
  // The low bits of a large power of two count in ones.
  __device__ void decode(const unsigned char* strip, int t, uint32_t (&pairs)[4]) const {
    const unsigned char* run = strip + t * kRunBytes;
    if constexpr (Bits == 4) {
      const uint32_t codes = *reinterpret_cast<const uint32_t*>(run);
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[i] = (codes >> 4 * i & 0x000F000F) | pair_of<T>(kPower);
    } else {
      const uint2 codes = *reinterpret_cast<const uint2*>(run);
      pairs[0] = bytes(codes.x);
      pairs[1] = bytes(codes.x >> 8);
      pairs[2] = bytes(codes.y);
      pairs[3] = bytes(codes.y >> 8);
    }
  }
  // bfloat16 has room for seven bits below a power of two: the eighth takes 256 off or 128.
  static __device__ uint32_t bytes(uint32_t codes) {
    if constexpr (kBf16)
      return add_pairs<T>((codes & 0x007F007F) | pair_of<T>(128),
                          (~codes & 0x00800080) | pair_of<T>(-128));
    else
      return (codes & 0x00FF00FF) | pair_of<T>(kPower);
  }

  static __device__ uint4 arrange(const uint4& x) {
    if constexpr (Bits == 4)
      return make_uint4(permute_bytes(x.x, x.z, 0x5410), permute_bytes(x.x, x.z, 0x7632),
                        permute_bytes(x.y, x.w, 0x5410), permute_bytes(x.y, x.w, 0x7632));
    else
      return make_uint4(permute_bytes(x.x, x.y, 0x5410), permute_bytes(x.x, x.y, 0x7632),
                        permute_bytes(x.z, x.w, 0x5410), permute_bytes(x.z, x.w, 0x7632));
  }
};

}  // namespace rs::cuda
