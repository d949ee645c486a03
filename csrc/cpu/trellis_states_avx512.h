// Tiles and hashed states of the trellis on AVX-512. Included behind avx512.h, so internal to its
// file.
#pragma once

namespace rs {
namespace {

// The 16 * K bytes of a tile; nothing past them is touched.
template <int K>
struct TileBytes {
  __m512i low, high;

  RS_INLINE explicit TileBytes(const uint8_t* tile)
      : low(first < K<4 ? 16 * K : 64>(tile)),
        high(K > 4 ? first<K <= 4 ? 64 : 16 * K - 64>(tile + 64) : low) {}
  // Masked loads are a little slower, and much beside stores.
  template <int Size>
  static RS_INLINE __m512i first(const uint8_t* p) {
    if constexpr (Size == 64) return load(p);
    const __m128i* parts = reinterpret_cast<const __m128i*>(p);
    if constexpr (Size == 16) return _mm512_castsi128_si512(_mm_loadu_si128(parts));
    const __m512i half =
        _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    if constexpr (Size == 32) return half;
    return _mm512_inserti32x4(half, _mm_loadu_si128(parts + 2), 2);
  }
  RS_INLINE __m512i permute(const Bytes& index) const {
    if constexpr (K <= 4) return _mm512_permutexvar_epi8(load(index.at), low);
    return _mm512_permutex2var_epi8(low, load(index.at), high);
  }
};

// High and low half of state * kTrellisMultiplier.
RS_INLINE void hash(__m512i s, __m512i* high, __m512i* low) {
  const __m512i m1 = _mm512_set1_epi16(static_cast<short>(kTrellisMultiplier >> 16));
  const __m512i m0 = _mm512_set1_epi16(static_cast<short>(kTrellisMultiplier & 0xFFFF));
  *high = _mm512_add_epi16(_mm512_mullo_epi16(s, m1), _mm512_mulhi_epu16(s, m0));
  *low = _mm512_mullo_epi16(s, m0);
}

}  // namespace
}  // namespace rs
