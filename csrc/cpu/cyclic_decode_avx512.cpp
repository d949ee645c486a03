// Blocks of eight weights on AVX-512: two codes' vectors are one register, their factors come from
// a register of sixteen.
#include "cyclic_product.h"
#include "fast.h"

#if RS_FAST_X86
#include "avx512.h"

namespace rs {
namespace {

template <class Word>
struct TurnFactors {
  alignas(64) float at[16]{};
  constexpr TurnFactors() {
    for (int i = 0; i < 16; ++i) at[i] = static_cast<float>(kCyclic[0][i]) / (1 << Word::kShift);
  }
};
template <class Word>
constexpr TurnFactors<Word> kTurnFactors;

// The first `count` of 16 codes in 32-bit lanes, zero beyond.
template <class Word>
RS_INLINE __m512i codes_of(const uint8_t* codes, int64_t count) {
  const uint32_t mask = count >= 16 ? 0xFFFF : (1u << count) - 1;
  if constexpr (Word::kBytes == 4)
    return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask), codes);
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), codes));
}
RS_INLINE __m512i field(__m512i words, int shift, int top) {
  return _mm512_and_si512(_mm512_srli_epi32(words, shift), _mm512_set1_epi32(top));
}

// Factors of 16 codes. Every product is exact; the sum turns -0, which no integer has, into 0.
template <class Word>
RS_INLINE __m512 factors_of(__m512i words) {
  constexpr int kAt = Word::kBytes == 4      ? 8
                      : Word::kVectors == 16 ? 4
                                             : 0,
                kPhase = Word::kBytes == 4 ? 28 : 12;
  __m512i turn = _mm512_srli_epi32(words, kPhase);  // vpermps takes four bits of it
  if constexpr (kAt != 0)
    turn = _mm512_add_epi32(turn, _mm512_slli_epi32(field(words, kPhase - 2, 3), 2));
  const __m512 cosine = _mm512_permutexvar_ps(turn, _mm512_load_ps(kTurnFactors<Word>.at)),
               amp = _mm512_cvtepi32_ps(field(words, kAt, Word::kAmps - 1));
  return _mm512_add_ps(_mm512_mul_ps(cosine, amp), _mm512_setzero_ps());
}

RS_INLINE void store(float* w, __m512 value, bool both) {
  if (both)
    _mm512_storeu_ps(w, value);
  else
    _mm256_storeu_ps(w, _mm512_castps512_ps256(value));
}
RS_INLINE void store(uint16_t* w, __m512 value, bool both) {
  const __m256i words = _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(value), 16));
  if (both)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(w), words);
  else
    _mm_storeu_si128(reinterpret_cast<__m128i*>(w), _mm256_castsi256_si128(words));
}

template <class Word, class T>
void decode_rows(const uint8_t* codes, int64_t rows, int64_t columns, const float* basis, T* w) {
  constexpr int kIndex = Word::kBytes == 4 || Word::kVectors == 16 ? 0 : 4;
  const __m512i halves =
      _mm512_srli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 3);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += 16) {
      const int64_t count = columns - c < 16 ? columns - c : 16;
      const __m512i words = codes_of<Word>(codes, count);
      const __m512 factors = factors_of<Word>(words);
      alignas(64) int32_t at[16];
      _mm512_store_si512(at, _mm512_slli_epi32(field(words, kIndex, Word::kVectors - 1), 3));
      for (int i = 0; i < count; i += 2, w += 16) {
        const __m512 vectors =
            _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(basis + at[i])),
                               _mm256_loadu_ps(basis + at[i + 1]), 1);
        const __m512i which = _mm512_add_epi32(halves, _mm512_set1_epi32(i));
        const bool both = i + 1 < count;
        store(w, _mm512_mul_ps(_mm512_permutexvar_ps(which, factors), vectors), both);
        if (!both) w -= 8;
      }
      codes += count * Word::kBytes;
    }
}

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {
namespace {

template <class Word, class T>
void decode(const Layer& layer, int64_t row0, int64_t row1, T* w) {
  constexpr int64_t kSize = Word::kVectors * 8;
  const int64_t columns = layer.tile_cols();
  float basis[kSize];  // rounding to bfloat16 wants quiet NaNs
  for (int64_t i = 0; i < kSize; ++i) basis[i] = quiet(layer.params[kCyclicBasis][i]);
  decode_rows<Word>(layer.codes + row0 * columns * Word::kBytes, row1 - row0, columns, basis, w);
}
template <class Word>
void fill_decode(Row& row) {
  row.decode = decode<Word, float>;
  row.decode_bf16 = decode<Word, uint16_t>;
}
}  // namespace

void cyclic_decode_avx512_slots(Cyclic16Word, Row& row) { fill_decode<Cyclic16Word>(row); }
void cyclic_decode_avx512_slots(CyclicCompoundWord, Row& row) {
  fill_decode<CyclicCompoundWord>(row);
}
void cyclic_decode_avx512_slots(Cyclic32Word, Row& row) { fill_decode<Cyclic32Word>(row); }

}  // namespace rs
#endif
