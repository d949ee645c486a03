// Rows of a trellis tile on AVX2: the eight states of one, hashed in 32-bit lanes. Included between
// a `#pragma GCC target` and its pop_options, so internal to its file.
//
// The lanes hold states 0 1 4 5 2 3 6 7: unpacked with a second register, they make the row's 16
// weights in two registers.
#pragma once

#include "inline.h"

namespace rs {
namespace {

// A row starts on byte K * row of the ring. Its windows by a byte shuffle of the 16 bytes around it
// and a shift to the left, for rows that start on an even byte and on an odd one.
template <int K>
struct RowCuts {
  alignas(32) uint8_t bytes[2][32]{};
  alignas(32) uint32_t shift[8]{};

  constexpr RowCuts() {
    for (int lane = 0; lane < 8; ++lane) {
      const int state = lane % 2 + lane / 4 * 2 + lane / 2 % 2 * 4;
      shift[lane] = static_cast<uint32_t>(K * state % 8);
      for (int odd = 0; odd < 2; ++odd)
        for (int t = 0; t < 4; ++t)
          bytes[odd][4 * lane + 3 - t] = static_cast<uint8_t>((K * state / 8 + odd + t) ^ 1);
    }
  }
};
template <int K>
constexpr RowCuts<K> kRowCuts;

// 16 ring bytes from `Start` on; past the end of the ring its beginning.
template <int K, int Start>
RS_INLINE __m128i ring(const uint8_t* tile) {
  const auto at = [](const uint8_t* p) { return reinterpret_cast<const __m128i*>(p); };
  if constexpr (Start + 16 <= 16 * K) return _mm_loadu_si128(at(tile + Start));
  return _mm_alignr_epi8(_mm_loadu_si128(at(tile)), _mm_loadu_si128(at(tile + 16 * K - 16)),
                         Start - (16 * K - 16));
}

// state * kTrellisMultiplier of the row's states.
template <int K, int Row>
RS_INLINE __m256i hash_row(const uint8_t* tile) {
  constexpr int kStart = K * Row;
  const auto load = [](const auto* p) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  };
  const __m256i bits =
      _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(ring<K, (kStart & ~1)>(tile)),
                          load(kRowCuts<K>.bytes[kStart % 2]));
  const __m256i states = _mm256_srli_epi32(_mm256_sllv_epi32(bits, load(kRowCuts<K>.shift)), 16);
  return _mm256_mullo_epi32(states, _mm256_set1_epi32(static_cast<int>(kTrellisMultiplier)));
}

// Where the points of the hashes are in a table of float pairs, in bytes.
RS_INLINE __m256i point_offsets(__m256i hashes) {
  return _mm256_and_si256(_mm256_srli_epi32(hashes, 18), _mm256_set1_epi32(1023 * 8));
}

// The signs of the row's weights, in the uppermost bits: 0 to 7 (Half 0) or 8 to 15 (Half 1).
template <int Half>
RS_INLINE __m256 row_signs(__m256i hashes) {
  const __m256i v = _mm256_slli_epi32(hashes, 16);
  const __m256i both = Half ? _mm256_unpackhi_epi32(hashes, v) : _mm256_unpacklo_epi32(hashes, v);
  return _mm256_castsi256_ps(
      _mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0x80000000u))));
}

}  // namespace
}  // namespace rs
