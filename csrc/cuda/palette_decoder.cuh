// Codebook indices two at a time: the pair of values is one read of a table in shared memory, which
// has a column for each lane, so that no two lanes of a warp want the same bank.
#pragma once

#include "../codecs/palette.h"
#include "pairs.cuh"

namespace rs::cuda {

// Of a codebook of the layer, indices of `Bits`: dense, or in words of five.
template <class T, int Bits, bool Words>
struct PaletteDecoder {
  static constexpr int kRun = Words ? 40 : 8, kRunBytes = Words ? 16 : Bits;
  static constexpr int kRead = Words ? 16 : 4, kScales = 0;
  static constexpr float kShift = 0;
  static constexpr int kPairBits = 2 * Bits, kPairs = 1 << kPairBits;
  static constexpr int kTableBytes = kPairs * 32 * 4;

  const unsigned char* table;
  uint32_t column;

  static __device__ void fill(const LayerView& layer, uint32_t* table) {
    constexpr int kMask = (1 << Bits) - 1;
    const float* codebook = layer.params[Palette<DenseIndex<Bits>, false>::kCodebook];
    for (int i = threadIdx.x; i < kPairs * 32; i += blockDim.x)
      table[i] = pack_pair<T>(codebook[i / 32 & kMask], codebook[i / 32 >> Bits]);
  }
  __device__ PaletteDecoder(const LayerView&, const uint32_t* table)
      : table(reinterpret_cast<const unsigned char*>(table)), column(threadIdx.x % 32 * 4) {}

  // The pair whose index stands from bit At on; a row of the table is 128 bytes.
  template <int At>
  __device__ uint32_t pair(uint32_t codes) const {
    constexpr uint32_t kMask = (kPairs - 1) << 7;
    const uint32_t row = (At < 7 ? codes << (7 - At) : codes >> (At - 7)) & kMask;
    return *reinterpret_cast<const uint32_t*>(table + (row | column));
  }
  template <int Count>
  __device__ void pairs_of(uint32_t codes, uint32_t* pairs) const {
    if constexpr (Count > 0) {
      pairs_of<Count - 1>(codes, pairs);
      pairs[Count - 1] = pair<(Count - 1) * kPairBits>(codes);
    }
  }

  __device__ void decode(const unsigned char* strip, int t, uint32_t (&pairs)[kRun / 2]) const {
    if constexpr (Words) {
      const uint4 four = reinterpret_cast<const uint4*>(strip)[t];
      const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)  // bits 15 and 31 are no index's
        pairs_of<5>((words[i] & 0x7FFF) | (words[i] >> 1 & 0x3FFF8000), pairs + 5 * i);
    } else if constexpr (Bits == 4) {
      pairs_of<4>(reinterpret_cast<const uint32_t*>(strip)[t], pairs);
    } else {
      // Three words are four runs; the second word of the last run goes unused.
      const auto* words = reinterpret_cast<const uint32_t*>(strip) + 3 * t / 4;
      pairs_of<4>(funnel_right(words[0], words[1], 24 * t % 32), pairs);
    }
  }
  static __device__ uint4 arrange(const uint4& x) { return x; }
};

}  // namespace rs::cuda
