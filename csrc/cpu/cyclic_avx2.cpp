// Sums of cyclic codes on AVX2: 16 codes are taken apart at once, levels by vpshufb, pairs of
// products added by vpmaddwd.
#include "cyclic_product.h"
#include "fast.h"
#include "inline.h"
#include "integers.h"

#if RS_FAST_X86
#include <bit>
#include <cstring>

#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")

namespace rs {
namespace {

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
struct Pair {
  __m256i level, index;
};
RS_INLINE Pair fields(Cyclic16Word, const uint8_t* codes) {
  const __m256i w = load(codes);
  return {level(_mm256_srli_epi16(w, 12), _mm256_and_si256(w, _mm256_set1_epi16(15))),
          _mm256_and_si256(_mm256_srli_epi16(w, 4), _mm256_set1_epi16(255))};
}
RS_INLINE Pair fields(CyclicCompoundWord, const uint8_t* codes) {
  const __m256i w = load(codes);
  return {level(turn_of(w), _mm256_and_si256(_mm256_srli_epi16(w, 4), _mm256_set1_epi16(63))),
          _mm256_and_si256(w, _mm256_set1_epi16(15))};
}
// The words of 16 32-bit lanes that fit; vpackusdw packs within 128 bits.
RS_INLINE __m256i join(__m256i a, __m256i b) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xD8);
}
RS_INLINE Pair fields(Cyclic32Word, const uint8_t* codes) {
  const __m256i a = load(codes), b = load(codes + 32), half = _mm256_set1_epi32(0xFFFF);
  const __m256i low = join(_mm256_and_si256(a, half), _mm256_and_si256(b, half)),
                high = join(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16));
  return {level(turn_of(high), _mm256_srli_epi16(low, 8)),
          _mm256_and_si256(low, _mm256_set1_epi16(255))};
}

using Part = __m128i;

// The first `bytes` of 64, the rest zero.
RS_INLINE const uint8_t* whole_line(const uint8_t* codes, int64_t bytes, int64_t line,
                                    uint8_t* room) {
  if (bytes >= line) return codes;
  std::memset(room, 0, static_cast<size_t>(line));
  std::memcpy(room, codes, static_cast<size_t>(bytes));
  return room;
}

template <int Shift, class Word>
RS_INLINE void take_apart(Word word, const uint8_t* codes, int64_t left, Part* level, Part* index) {
  uint8_t room[32 * Word::kBytes];
  codes = whole_line(codes, left * Word::kBytes, 32 * Word::kBytes, room);  // code 0 has level 0
  for (int i = 0; i < 4; i += 2, codes += 16 * Word::kBytes) {
    const Pair f = fields(word, codes);
    const __m256i at = _mm256_slli_epi16(f.index, Shift);
    level[i] = _mm256_castsi256_si128(f.level);
    level[i + 1] = _mm256_extracti128_si256(f.level, 1);
    index[i] = _mm256_castsi256_si128(at);
    index[i + 1] = _mm256_extracti128_si256(at, 1);
  }
}

RS_INLINE void add_wide(int64_t* sums, __m256i more) {
  auto* to = reinterpret_cast<__m256i*>(sums);
  _mm256_storeu_si256(to, _mm256_add_epi64(_mm256_loadu_si256(to), more));
}

template <int Lanes>
struct Side;
template <>
struct Side<8> {
  using Words = __m128i;
  RS_INLINE static Words zero() { return _mm_setzero_si128(); }
  RS_INLINE static Words load(const void* p) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p));
  }
  RS_INLINE static Words unpack_low(Words a, Words b) { return _mm_unpacklo_epi16(a, b); }
  RS_INLINE static Words unpack_high(Words a, Words b) { return _mm_unpackhi_epi16(a, b); }
  RS_INLINE static Words pair(int32_t words) { return _mm_set1_epi32(words); }
  RS_INLINE static Words add_products(Words sum, Words a, Words b) {
    return _mm_add_epi32(sum, _mm_madd_epi16(a, b));
  }
  RS_INLINE static void add_to(int64_t* sums, Words s) { add_wide(sums, _mm256_cvtepi32_epi64(s)); }
  RS_INLINE static void add_to(int64_t* sums, Words low, Words high) {
    add_wide(sums, _mm256_add_epi64(_mm256_cvtepi32_epi64(low),
                                    _mm256_slli_epi64(_mm256_cvtepi32_epi64(high), 8)));
  }
};
template <>
struct Side<16> {
  using Words = __m256i;
  RS_INLINE static Words zero() { return _mm256_setzero_si256(); }
  RS_INLINE static Words load(const void* p) { return rs::load(p); }
  RS_INLINE static Words unpack_low(Words a, Words b) { return _mm256_unpacklo_epi16(a, b); }
  RS_INLINE static Words unpack_high(Words a, Words b) { return _mm256_unpackhi_epi16(a, b); }
  RS_INLINE static Words pair(int32_t words) { return _mm256_set1_epi32(words); }
  RS_INLINE static Words add_products(Words sum, Words a, Words b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
  }
  template <class... More>
  RS_INLINE static void add_to(int64_t* sums, Words s, More... high) {
    Side<8>::add_to(sums, _mm256_castsi256_si128(s), _mm256_castsi256_si128(high)...);
    Side<8>::add_to(sums + 4, _mm256_extracti128_si256(s, 1), _mm256_extracti128_si256(high, 1)...);
  }
};

}  // namespace
}  // namespace rs

#include "cyclic_loops.h"

namespace rs {
namespace {

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

template <class Word>
CyclicKernel cyclic_kernel_avx2(int64_t batch) {
  if (batch <= 1) return {sums_of_one<Word>, 1, true};
  if (batch <= 8) return {sums_of_lanes<Word, 8, 1>, 8, false};
  return {sums_of_lanes<Word, 16, 1>, 16, false};
}
template CyclicKernel cyclic_kernel_avx2<Cyclic16Word>(int64_t);
template CyclicKernel cyclic_kernel_avx2<CyclicCompoundWord>(int64_t);
template CyclicKernel cyclic_kernel_avx2<Cyclic32Word>(int64_t);

}  // namespace rs
#endif
