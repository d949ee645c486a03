// Vectors of 4 and 8 weights on AVX-512 (BW, VBMI, VNNI).
//
// linear   eight codes to a 64-bit word; a code's low four bits find the prototype's int16 weights
//          by vpermi2q (halves of them for 8), the next turns them by vpshufb, the last negates.
#include "fast.h"

#if RS_FAST_X86
#include "../codecs/vq_cyclic.h"
#include "lanes.h"

namespace rs {
namespace {

// Block 4: quadword q gets six bytes, eight codes. Block 8: both quadwords of a 128-bit lane do.
template <int Block>
struct Spread {
  Bytes bytes{}, turn{};
  constexpr Spread() {
    for (int i = 0; i < 64; ++i) {
      bytes.at[i] = static_cast<uint8_t>(i % 8 < 6 ? i / (2 * Block) * 6 + i % 8 : 63);
      const int vector = i / (2 * Block) * 2 * Block;  // rolled by Block / 4 int16
      turn.at[i] =
          static_cast<uint8_t>((vector + (i - vector + 2 * Block - Block / 2) % (2 * Block)) % 16);
    }
  }
};
template <int Block>
constexpr Spread<Block> kSpread;

}  // namespace
}  // namespace rs

#include "avx512.h"
#include "lanes_avx512.h"

namespace rs {
namespace {

template <int Block>
struct VectorView {
  static constexpr int kParts = 8, kLane = Block, kBytes = 192 / Block;
  static constexpr bool kScaled = false, kPrepared = false;
  __m512i table[Block / 2];  // quadwords: of block 8 all first halves, then all second halves

  RS_INLINE explicit VectorView(const int16_t* prototypes) {
    alignas(64) int16_t at[16 * Block];
    for (int p = 0; p < kPrototypes; ++p)
      for (int j = 0; j < Block; ++j) at[j / 4 * 64 + p * 4 + j % 4] = prototypes[p * Block + j];
    for (int i = 0; i < Block / 2; ++i) table[i] = load(at + 32 * i);
  }
  RS_INLINE __m512i words(__m512i codes) const {
    return _mm512_permutexvar_epi8(load(kSpread<Block>.bytes.at), codes);
  }
  template <int K>
  RS_INLINE __m512i lookup(__m512i words) const {
    const __m512i code = _mm512_srli_epi64(words, 6 * K);
    __m512i w = _mm512_permutex2var_epi64(table[0], code, table[1]);
    if constexpr (Block == 8)
      w = _mm512_mask_mov_epi64(w, 0xAA, _mm512_permutex2var_epi64(table[2], code, table[3]));
    const __mmask8 roll = _mm512_test_epi64_mask(code, _mm512_set1_epi64(16));
    const __mmask8 negate = _mm512_test_epi64_mask(code, _mm512_set1_epi64(32));
    w = _mm512_mask_mov_epi64(w, roll, _mm512_shuffle_epi8(w, load(kSpread<Block>.turn.at)));
    const __m512i sign = _mm512_maskz_set1_epi64(negate, -1);
    return _mm512_sub_epi16(_mm512_xor_si512(w, sign), sign);
  }
};

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {
namespace {

template <int Block>
void linear(const Layer& layer, const float* x, int64_t m, float* y) {
  const IntegerTable table(layer.params[0], kPrototypes * Block);
  lane_linear(layer, x, m, y, table, VectorView<Block>::kParts, VectorView<Block>::kLane,
              kLaneKernels<VectorView<Block>>);
}

}  // namespace

void vq_cyclic_avx512_slots(Row& row, int64_t block) {
  if (block != 4 && block != 8) return;
  row.linear = block == 4 ? linear<4> : linear<8>;
  row.linear_max_m = 2 * kMaxBatch;
  row.linear_type = "16-bit prototypes and activations per row";
}

}  // namespace rs
#endif
