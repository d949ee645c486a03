// Cyclic codes decoded to float32 on AVX2, blocks of 4 or of a multiple of 8: eight codes are taken
// apart at once in 32-bit lanes, their levels by vpshufb.
#include "cyclic_product.h"
#include "fast.h"

#if RS_FAST_X86
#include "lanes_avx2.h"

namespace rs {
namespace {

RS_INLINE __m256i field(__m256i words, int shift, int top) {
  return _mm256_and_si256(_mm256_srli_epi32(words, shift), _mm256_set1_epi32(top));
}

template <class Word>
RS_INLINE __m256i codes_of(const uint8_t* codes) {
  if constexpr (Word::kBytes == 4)
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
}

// All of it is exact: levels have at most 16 bits.
template <class Word>
RS_INLINE __m256 factors_of(__m256i words) {
  constexpr bool kTurns = Word::kBytes == 4 || Word::kVectors == 16;  // by diff
  constexpr int kPhase = Word::kBytes == 4 ? 28 : 12;
  constexpr int kAmp = Word::kBytes == 4 ? 8 : kTurns ? 4 : 0;
  __m256i turn = _mm256_srli_epi32(words, kPhase);
  if constexpr (kTurns)
    turn = _mm256_add_epi32(turn, _mm256_slli_epi32(field(words, kPhase - 2, 3), 2));
  // The index in the uppermost byte of a lane; none in the others.
  const __m256i at =
      _mm256_or_si256(_mm256_slli_epi32(_mm256_and_si256(turn, _mm256_set1_epi32(15)), 24),
                      _mm256_set1_epi32(0x808080));
  const __m256i table =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kCyclic[0])));
  const __m256i level = _mm256_mullo_epi32(_mm256_srai_epi32(_mm256_shuffle_epi8(table, at), 24),
                                           field(words, kAmp, Word::kAmps - 1));
  return _mm256_mul_ps(_mm256_cvtepi32_ps(level), _mm256_set1_ps(1.0f / (1 << Word::kShift)));
}

template <class Word>
struct EightCodes {
  alignas(32) float factor[8];
  alignas(32) int32_t index[8];

  RS_INLINE explicit EightCodes(const uint8_t* codes) {
    constexpr int kIndex = Word::kBytes == 4 || Word::kVectors == 16 ? 0 : 4;
    const __m256i words = codes_of<Word>(codes);
    _mm256_store_ps(factor, factors_of<Word>(words));
    _mm256_store_si256(reinterpret_cast<__m256i*>(index), field(words, kIndex, Word::kVectors - 1));
  }
};

// The vectors of `count` codes, of which a block of 4 gets two at a time.
template <class Word, int Block>
RS_INLINE void expand(const EightCodes<Word>& codes, int64_t count, int64_t block,
                      const float* basis, float* w) {
  if constexpr (Block == 4) {
    int64_t i = 0;
    for (; i + 2 <= count; i += 2) {
      const __m256 factors = _mm256_set_m128(_mm_broadcast_ss(codes.factor + i + 1),
                                             _mm_broadcast_ss(codes.factor + i));
      const __m256 vectors = _mm256_loadu2_m128(basis + int64_t{codes.index[i + 1]} * 4,
                                                basis + int64_t{codes.index[i]} * 4);
      _mm256_storeu_ps(w + i * 4, _mm256_mul_ps(factors, vectors));
    }
    if (i < count)
      _mm_storeu_ps(w + i * 4, _mm_mul_ps(_mm_broadcast_ss(codes.factor + i),
                                          _mm_loadu_ps(basis + int64_t{codes.index[i]} * 4)));
    return;
  }
  const int64_t length = Block ? Block : block;
  for (int64_t i = 0; i < count; ++i, w += length) {
    const __m256 factor = _mm256_broadcast_ss(codes.factor + i);
    const float* vector = basis + codes.index[i] * length;
    for (int64_t j = 0; j < length; j += 8)
      _mm256_storeu_ps(w + j, _mm256_mul_ps(factor, _mm256_loadu_ps(vector + j)));
  }
}

template <class Word, int Block>
void decode_codes(const uint8_t* codes, int64_t count, int64_t block, const float* basis,
                  float* w) {
  for (; count >= 8; count -= 8, codes += 8 * Word::kBytes, w += 8 * block)
    expand<Word, Block>(EightCodes<Word>(codes), 8, block, basis, w);
  if (!count) return;
  uint8_t rest[8 * Word::kBytes] = {};
  __builtin_memcpy(rest, codes, static_cast<size_t>(count) * Word::kBytes);
  expand<Word, Block>(EightCodes<Word>(rest), count, block, basis, w);
}

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {
namespace {

template <class Word, int Block>
void decode(const Layer& layer, int64_t row0, int64_t row1, float* w) {
  const int64_t columns = layer.tile_cols();
  decode_codes<Word, Block>(layer.codes + row0 * columns * Word::kBytes, (row1 - row0) * columns,
                            layer.tile.cols, layer.params[kCyclicBasis], w);
}
template <class Word>
void fill_decode(Row& row) {
  const int64_t block = row.tile.cols;
  if (block == 4) row.decode = decode<Word, 4>;
  if (block % 8 == 0) row.decode = block == 8 ? decode<Word, 8> : decode<Word, 0>;
}

}  // namespace

void cyclic_decode_avx2_slots(Cyclic16Word, Row& row) { fill_decode<Cyclic16Word>(row); }
void cyclic_decode_avx2_slots(CyclicCompoundWord, Row& row) {
  fill_decode<CyclicCompoundWord>(row);
}
void cyclic_decode_avx2_slots(Cyclic32Word, Row& row) { fill_decode<Cyclic32Word>(row); }

}  // namespace rs
#endif
