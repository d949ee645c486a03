// Sums of cyclic codes on AVX-512: 32 codes are taken apart at once, pairs of products added by
// vpdpwssd.
#include "cyclic_product.h"
#include "fast.h"

#if RS_FAST_X86
#include "avx512.h"

namespace rs {
namespace {

using Part = __m128i;

struct Turns {
  alignas(64) int16_t at[32]{};
  constexpr Turns() {
    for (int i = 0; i < 32; ++i) at[i] = kCyclic[0][i & 15];
  }
};
constexpr Turns kTurns;

RS_INLINE __m512i turn_of(__m512i words) {  // phase in bits 12 to 15, diff in 10 and 11
  const __m512i diff = _mm512_and_si512(_mm512_srli_epi16(words, 8), _mm512_set1_epi16(12));
  return _mm512_add_epi16(_mm512_srli_epi16(words, 12), diff);  // below 32: the table repeats
}
RS_INLINE __m512i level_of(__m512i turn, __m512i amp) {
  return _mm512_mullo_epi16(_mm512_permutexvar_epi16(turn, load(kTurns.at)), amp);
}

RS_INLINE __m512i load_some(const uint8_t* codes, int64_t bytes) {
  if (bytes >= 64) return load(codes);
  return _mm512_maskz_loadu_epi8(bytes > 0 ? (1ull << bytes) - 1 : 0, codes);
}

struct Pair {
  __m512i level, index;
};
RS_INLINE Pair fields(Cyclic16Word, __m512i w) {
  return {level_of(_mm512_srli_epi16(w, 12), _mm512_and_si512(w, _mm512_set1_epi16(15))),
          _mm512_and_si512(_mm512_srli_epi16(w, 4), _mm512_set1_epi16(255))};
}
RS_INLINE Pair fields(CyclicCompoundWord, __m512i w) {
  const __m512i amp = _mm512_and_si512(_mm512_srli_epi16(w, 4), _mm512_set1_epi16(63));
  return {level_of(turn_of(w), amp), _mm512_and_si512(w, _mm512_set1_epi16(15))};
}
// The lower and upper halves of 32 codes.
RS_INLINE Pair fields(Cyclic32Word, __m512i low, __m512i high) {
  return {level_of(turn_of(high), _mm512_srli_epi16(low, 8)),
          _mm512_and_si512(low, _mm512_set1_epi16(255))};
}

template <class Word>
RS_INLINE Pair fields(Word word, const uint8_t* codes, int64_t left) {
  return fields(word, load_some(codes, 2 * left));
}
RS_INLINE Pair fields(Cyclic32Word word, const uint8_t* codes, int64_t left) {
  const __m512i a = load_some(codes, 4 * left), b = load_some(codes + 64, 4 * left - 64);
  const __m512i low = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(a)),
                                         _mm512_cvtepi32_epi16(b), 1);
  const __m512i high =
      _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_srli_epi32(a, 16))),
                         _mm512_cvtepi32_epi16(_mm512_srli_epi32(b, 16)), 1);
  return fields(word, low, high);
}

RS_INLINE void cut(__m512i whole, Part* parts) {
  parts[0] = _mm512_castsi512_si128(whole);
  parts[1] = _mm512_extracti32x4_epi32(whole, 1);
  parts[2] = _mm512_extracti32x4_epi32(whole, 2);
  parts[3] = _mm512_extracti32x4_epi32(whole, 3);
}
template <int Shift, class Word>
RS_INLINE void take_apart(Word word, const uint8_t* codes, int64_t left, Part* level, Part* index) {
  const Pair f = fields(word, codes, left);
  cut(f.level, level);
  cut(_mm512_slli_epi16(f.index, Shift), index);
}

RS_INLINE void add_wide(int64_t* sums, __m512i more) {
  _mm512_storeu_si512(sums, _mm512_add_epi64(load(sums), more));
}
// sums[16] += s, or s + 256 high
RS_INLINE void add_to(int64_t* sums, __m512i s) {
  add_wide(sums, _mm512_cvtepi32_epi64(_mm512_castsi512_si256(s)));
  add_wide(sums + 8, _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(s, 1)));
}
RS_INLINE void add_to(int64_t* sums, __m512i s, __m512i high) {
  const auto wide = [](__m256i low, __m256i upper) RS_LAMBDA {
    return _mm512_add_epi64(_mm512_cvtepi32_epi64(low),
                            _mm512_slli_epi64(_mm512_cvtepi32_epi64(upper), 8));
  };
  add_wide(sums, wide(_mm512_castsi512_si256(s), _mm512_castsi512_si256(high)));
  add_wide(sums + 8, wide(_mm512_extracti64x4_epi64(s, 1), _mm512_extracti64x4_epi64(high, 1)));
}

template <int Lanes>
struct Side;
template <>
struct Side<32> {
  using Words = __m512i;
  RS_INLINE static Words zero() { return _mm512_setzero_si512(); }
  RS_INLINE static Words load(const void* p) { return _mm512_loadu_si512(p); }
  RS_INLINE static Words unpack_low(Words a, Words b) { return _mm512_unpacklo_epi16(a, b); }
  RS_INLINE static Words unpack_high(Words a, Words b) { return _mm512_unpackhi_epi16(a, b); }
  RS_INLINE static Words pair(int32_t words) { return _mm512_set1_epi32(words); }
  RS_INLINE static Words add_products(Words sum, Words a, Words b) {
    return _mm512_dpwssd_epi32(sum, a, b);
  }
  template <class... More>
  RS_INLINE static void add_to(int64_t* sums, Words s, More... high) {
    rs::add_to(sums, s, high...);
  }
};

}  // namespace
}  // namespace rs

#include "cyclic_loops.h"
#include "cyclic_registers_avx512.h"

namespace rs {
namespace {

void scatter(const int16_t* level, const uint8_t* bin, const int8_t* g, int64_t rows,
             int32_t* bins) {
  for (int64_t r = 0; r < rows; ++r, g += kCyclicLanes) {
    int32_t* to = bins + bin[r] * kCyclicLanes;
    const __m512i lanes =
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(g)));
    const __m512i product = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(level[r]));
    _mm512_storeu_si512(to, _mm512_add_epi32(load(to), product));
  }
}

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {
namespace {

constexpr int kMostApart = 16;  // rows of x; for more, lookups in memory bring all at once

}  // namespace

void cyclic_scatter_avx512(const int16_t* level, const uint8_t* bin, const int8_t* g, int64_t rows,
                           int32_t* bins) {
  scatter(level, bin, g, rows, bins);
}

template <class Word>
CyclicKernel cyclic_kernel_avx512(int64_t batch) {
  constexpr int kWide = kMostParts<Word> < 2 ? 1 : 2;
  if (batch <= kMostApart) return {sums_in_registers<Word>, static_cast<int>(batch), true};
  return {sums_of_lanes<Word, 32, kWide>, 32, false};
}
template CyclicKernel cyclic_kernel_avx512<Cyclic16Word>(int64_t);
template CyclicKernel cyclic_kernel_avx512<CyclicCompoundWord>(int64_t);
template CyclicKernel cyclic_kernel_avx512<Cyclic32Word>(int64_t);

}  // namespace rs
#endif
