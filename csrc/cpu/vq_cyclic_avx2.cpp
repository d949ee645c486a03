// Vectors of 4 weights, or a multiple of 8, on AVX2: loaded from a table of all 64 codewords.
#include "../codecs/vq_cyclic.h"
#include "fast.h"

#if RS_FAST_X86
#include <cstring>

#include "lanes_avx2.h"

namespace rs {
namespace {

// Block 0: a multiple of 8 up to 32.
template <int Block>
struct VectorRows {
  static constexpr bool kGrouped = false;
  static constexpr int kWidth = Block ? Block : 32;
  const Layer& layer;
  VectorTable<kVqCodes, kWidth> words;

  explicit VectorRows(const Layer& layer) : layer(layer) {
    const VqCyclic::Tables tables(layer);
    const int block = Block ? Block : tables.block, quarter = block / 4;
    for (int p = 0; p < kPrototypes; ++p) {
      const float* from = tables.prototypes + p * block;
      for (int j = 0; j < block; ++j) {
        const float rolled = from[j < quarter ? j - quarter + block : j - quarter];
        words.at[p][j] = from[j];
        words.at[16 + p][j] = rolled;
        words.at[32 + p][j] = -from[j];
        words.at[48 + p][j] = -rolled;
      }
    }
  }

  template <class Visit>
  RS_INLINE void each(int64_t row, int64_t tile0, int64_t tile1, Visit visit) const {
    const uint8_t* tile = layer.codes + (row * layer.tile_cols() + tile0) * 3;
    const auto one = [&](int i, int64_t j, uint32_t codes) RS_LAMBDA {
      if constexpr (Block == 4) {
        constexpr uint32_t kMask = 63 * 16;
        visit(i, j, two_vectors(words.at, codes << 4 & kMask, codes >> 2 & kMask), 8);
        visit(i + 1, j + 8, two_vectors(words.at, codes >> 8 & kMask, codes >> 14 & kMask), 8);
      } else {
        const int64_t block = Block ? Block : layer.tile.cols / 4;
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v)
          for (int64_t k = 0; k < block; k += 8)
            visit(v, j + v * block + k, _mm256_load_ps(words.at[codes >> (6 * v) & 63] + k), 8);
      }
    };
    const int64_t cols = layer.tile.cols;
    // Four bytes are read for a tile: those of a row's last may not be there.
    int64_t t = tile0;
    for (; t + 2 < tile1; t += 2, tile += 6) {
      one(0, t * cols, load_word(tile));
      one(2, (t + 1) * cols, load_word(tile + 3));
    }
    for (; t < tile1; ++t, tile += 3)
      one(0, t * cols,
          tile[0] | static_cast<uint32_t>(tile[1]) << 8 | static_cast<uint32_t>(tile[2]) << 16);
  }
};

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {

void vq_cyclic_avx2_slots(Row& row, int64_t block) {
  if (block == 4) return fill_float_slots<VectorRows<4>>(row);
  if (block == 8) return fill_float_slots<VectorRows<8>>(row);
  if (block % 8 == 0 && block <= 32) fill_float_slots<VectorRows<0>>(row);
}

}  // namespace rs
#endif
