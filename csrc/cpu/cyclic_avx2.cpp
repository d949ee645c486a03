// Sums of cyclic codes on AVX2, a row at a time and 16 codes at once: levels by vpshufb, dot
// products one by one from tables that stay in the first cache, pairs of products by vpmaddwd.
#include "cyclic_product.h"
#include "fast.h"

#if RS_FAST_X86
#include <cstring>

#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")

namespace rs {
namespace {

#define RS_INLINE __attribute__((always_inline)) inline

constexpr int64_t kStrip = 32;  // columns

RS_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// turn (below 32) and amp in 16-bit words.
RS_INLINE __m256i level(__m256i turn, __m256i amp) {
  const __m256i table =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kCyclic[0])));
  // The index in the upper byte of a word, of which vpshufb takes four bits; none in the lower.
  const __m256i at = _mm256_or_si256(
      _mm256_slli_epi16(_mm256_and_si256(turn, _mm256_set1_epi16(15)), 8), _mm256_set1_epi16(0x80));
  return _mm256_mullo_epi16(_mm256_srai_epi16(_mm256_shuffle_epi8(table, at), 8), amp);
}
RS_INLINE __m256i turn_of(__m256i words) {  // phase in bits 12 to 15, diff in 10 and 11
  return _mm256_add_epi16(_mm256_srli_epi16(words, 12),
                          _mm256_and_si256(_mm256_srli_epi16(words, 8), _mm256_set1_epi16(12)));
}

// Levels and indices of 16 codes.
struct Fields {
  __m256i level, index;
};
RS_INLINE Fields fields(Cyclic16Word, const uint8_t* codes) {
  const __m256i w = load(codes);
  return {level(_mm256_srli_epi16(w, 12), _mm256_and_si256(w, _mm256_set1_epi16(15))),
          _mm256_and_si256(_mm256_srli_epi16(w, 4), _mm256_set1_epi16(255))};
}
RS_INLINE Fields fields(CyclicCompoundWord, const uint8_t* codes) {
  const __m256i w = load(codes);
  return {level(turn_of(w), _mm256_and_si256(_mm256_srli_epi16(w, 4), _mm256_set1_epi16(63))),
          _mm256_and_si256(w, _mm256_set1_epi16(15))};
}
// The words of 16 32-bit lanes that fit; vpackusdw packs within 128 bits.
RS_INLINE __m256i join(__m256i a, __m256i b) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xD8);
}
RS_INLINE Fields fields(Cyclic32Word, const uint8_t* codes) {
  const __m256i a = load(codes), b = load(codes + 32), half = _mm256_set1_epi32(0xFFFF);
  const __m256i low = join(_mm256_and_si256(a, half), _mm256_and_si256(b, half)),
                high = join(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16));
  return {level(turn_of(high), _mm256_srli_epi16(low, 8)),
          _mm256_and_si256(low, _mm256_set1_epi16(255))};
}

template <int Stride>
struct Bases {
  alignas(32) int16_t at[16]{};
  constexpr Bases() {
    for (int i = 0; i < 16; ++i) at[i] = static_cast<int16_t>(i * Stride);
  }
};

// Products of 16 codes with their columns' dot products, in four 64-bit sums.
template <class Word>
RS_INLINE __m256i products(const uint8_t* codes, const int16_t* table) {
  static constexpr Bases<Word::kVectors> kBases;
  const Fields f = fields(Word(), codes);
  alignas(32) uint16_t at[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(at), _mm256_add_epi16(f.index, load(kBases.at)));
  const __m256i dots = _mm256_setr_epi16(
      table[at[0]], table[at[1]], table[at[2]], table[at[3]], table[at[4]], table[at[5]],
      table[at[6]], table[at[7]], table[at[8]], table[at[9]], table[at[10]], table[at[11]],
      table[at[12]], table[at[13]], table[at[14]], table[at[15]]);
  const __m256i pairs = _mm256_madd_epi16(f.level, dots);
  return _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(pairs)),
                          _mm256_cvtepi32_epi64(_mm256_extracti128_si256(pairs, 1)));
}

template <class Word>
void sums_of_rows(const uint8_t* codes, int64_t row_bytes, int64_t rows, int64_t columns,
                  const int16_t* table, int64_t* sums) {
  const uint8_t* ahead = codes + rows * row_bytes;  // the next rows, fetched in their order
  for (int64_t r = 0; r < rows; ++r) sums[r] = 0;
  for (int64_t c = 0; c < columns; c += kStrip, table += kStrip * Word::kVectors) {
    const int64_t width = columns - c < kStrip ? columns - c : kStrip;
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t* row = codes + r * row_bytes + c * Word::kBytes;
      uint8_t rest[kStrip * Word::kBytes];
      if (width < kStrip) {  // code 0 has level 0
        std::memset(rest, 0, sizeof rest);
        std::memcpy(rest, row, static_cast<size_t>(width * Word::kBytes));
        row = rest;
      }
      for (int i = 0; i < Word::kBytes; i += 2, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
      const __m256i sum =
          _mm256_add_epi64(products<Word>(row, table),
                           products<Word>(row + 16 * Word::kBytes, table + 16 * Word::kVectors));
      const __m128i two =
          _mm_add_epi64(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
      sums[r] += _mm_cvtsi128_si64(two) + _mm_extract_epi64(two, 1);
    }
  }
}

template <class Word>
void sums_of_batch(const uint8_t* codes, int64_t row_bytes, int64_t rows, int64_t columns,
                   const int16_t* const* tables, int64_t batch, int64_t* sums) {
  for (int64_t b = 0; b < batch; ++b)
    sums_of_rows<Word>(codes, row_bytes, rows, columns, tables[b], sums + b * rows);
}

void scatter(const int16_t* level, const uint8_t* bin, const int8_t* g, int64_t rows,
             int32_t* bins) {
  for (int64_t r = 0; r < rows; ++r) {
    const __m256i factor = _mm256_set1_epi32(level[r]);
    for (int l = 0; l < kCyclicLanes; l += 8) {
      auto* to = reinterpret_cast<__m256i*>(bins + bin[r] * kCyclicLanes + l);
      const __m256i lanes = _mm256_cvtepi8_epi32(
          _mm_loadl_epi64(reinterpret_cast<const __m128i*>(g + r * kCyclicLanes + l)));
      _mm256_storeu_si256(to, _mm256_add_epi32(load(to), _mm256_mullo_epi32(lanes, factor)));
    }
  }
}

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {

void cyclic_scatter_avx2(const int16_t* level, const uint8_t* bin, const int8_t* g, int64_t rows,
                         int32_t* bins) {
  scatter(level, bin, g, rows, bins);
}

RS_CYCLIC_SUMS(avx2, Cyclic16Word) {
  sums_of_batch<Cyclic16Word>(codes, row_bytes, rows, columns, tables, batch, sums);
}
RS_CYCLIC_SUMS(avx2, CyclicCompoundWord) {
  sums_of_batch<CyclicCompoundWord>(codes, row_bytes, rows, columns, tables, batch, sums);
}
RS_CYCLIC_SUMS(avx2, Cyclic32Word) {
  sums_of_batch<Cyclic32Word>(codes, row_bytes, rows, columns, tables, batch, sums);
}

}  // namespace rs
#endif
