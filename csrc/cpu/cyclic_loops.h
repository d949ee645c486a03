// Sums of cyclic codes, for the instruction set of the file that includes this: codes are taken
// apart once, 32 at a time, and the dot products looked up one code after another in tables that
// stay in the first cache. Included behind the file's `#pragma GCC target`, so internal to it.
//
// The file brings
//   Part                                  8 codes' levels or indices, in words
//   take_apart(Word(), shift, codes, left, level, index)
//                                         4 parts each of 32 codes of which `left` are there (and
//                                         the others have level 0); indices shifted left
//   Side<Lanes>                           Lanes words, and their sums in 64 bits
#pragma once

namespace rs {
namespace {

// Levels of a word of 32 bits are split into bytes: two of their products fill 32 bits.
template <class Word>
constexpr bool kSplit = Word::kBytes == 4;
// Parts whose products sum up to 32 bits.
template <class Word>
constexpr int kMostParts = Word::kAmps == 16 || kSplit<Word> ? 4 : 1;

template <class Word>
RS_INLINE void prefetch_line(const uint8_t*& ahead) {
  for (int i = 0; i < 32 * Word::kBytes; i += 64, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
}

// One row of x.

// The dot products of eight codes: indices in the bytes of `at`, tables of neighbouring columns.
template <class Word>
RS_INLINE Part dots_of(uint64_t at, const int16_t* table) {
  constexpr int n = Word::kVectors;
  const auto dot = [&](int i) RS_LAMBDA {
    if (i % 2) return table[i * n + (at >> 8 & 255)];
    if (i) at >>= 16;
    asm("" : "+r"(at));  // in place: both bytes have names then, and a shift serves two
    return table[i * n + (at & 255)];
  };
  Part dots = _mm_setzero_si128();
  dots = _mm_insert_epi16(dots, dot(0), 0);
  dots = _mm_insert_epi16(dots, dot(1), 1);
  dots = _mm_insert_epi16(dots, dot(2), 2);
  dots = _mm_insert_epi16(dots, dot(3), 3);
  dots = _mm_insert_epi16(dots, dot(4), 4);
  dots = _mm_insert_epi16(dots, dot(5), 5);
  dots = _mm_insert_epi16(dots, dot(6), 6);
  return _mm_insert_epi16(dots, dot(7), 7);
}

template <class Word>
RS_INLINE int64_t sum_of(const uint64_t* at, const Part* level, const int16_t* table) {
  constexpr int n = 8 * Word::kVectors;
  Part pairs[4];
  for (int p = 0; p < 4; ++p)
    pairs[p] = _mm_madd_epi16(dots_of<Word>(at[p], table + p * n), level[p]);
  if constexpr (Word::kAmps == 16) {
    Part sum = _mm_add_epi32(_mm_add_epi32(pairs[0], pairs[1]), _mm_add_epi32(pairs[2], pairs[3]));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
    return _mm_cvtsi128_si32(sum) + _mm_extract_epi32(sum, 1);
  } else {
    __m256i sum = _mm256_cvtepi32_epi64(pairs[0]);
    for (int p = 1; p < 4; ++p) sum = _mm256_add_epi64(sum, _mm256_cvtepi32_epi64(pairs[p]));
    const __m128i two =
        _mm_add_epi64(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    return _mm_cvtsi128_si64(two) + _mm_extract_epi64(two, 1);
  }
}

template <class Word>
void sums_of_one(const uint8_t* codes, int64_t row_bytes, int64_t rows, int64_t columns,
                 const int16_t* table, int, int64_t* sums) {
  constexpr int64_t kGroup = 32;  // rows taken apart before they are looked up
  Part level[kGroup][4], index[4];
  alignas(16) uint64_t at[kGroup][4];
  const uint8_t* ahead = codes + rows * row_bytes;  // the next rows, fetched in their order
  for (int64_t r = 0; r < rows; ++r) sums[r] = 0;
  for (int64_t c = 0; c < columns; c += 32, table += 32 * Word::kVectors)
    for (int64_t r0 = 0; r0 < rows; r0 += kGroup) {
      const int64_t n = rows - r0 < kGroup ? rows - r0 : kGroup;
      for (int64_t i = 0; i < n; ++i) {
        prefetch_line<Word>(ahead);
        take_apart<0>(Word(), codes + (r0 + i) * row_bytes + c * Word::kBytes, columns - c,
                      level[i], index);
        for (int p = 0; p < 4; p += 2)
          _mm_store_si128(reinterpret_cast<__m128i*>(at[i] + p),
                          _mm_packus_epi16(index[p], index[p + 1]));
      }
      for (int64_t i = 0; i < n; ++i) sums[r0 + i] += sum_of<Word>(at[i], level[i], table);
    }
}

// Several rows of x.

// Codes of a row that share a strip of columns: their indices, levels and, where these are split,
// the levels' upper bytes.
template <class Word, int Parts>
struct Fields {
  Part index[Parts], level[Parts], upper[kSplit<Word> ? Parts : 0];
};

template <class Word, int Lanes, int Parts>
void sums_of_strip(const Fields<Word, Parts>* fields, int64_t rows, const int16_t* table,
                   int64_t* sums) {
  using S = Side<Lanes>;
  constexpr int kStep = 2 * Word::kVectors * Lanes;  // bytes of a column
  const auto* from = reinterpret_cast<const uint8_t*>(table);
  for (int64_t r = 0; r < rows; ++r, ++fields, sums += Lanes) {
    const auto* index = reinterpret_cast<const uint16_t*>(fields->index);
    const auto* level = reinterpret_cast<const int32_t*>(fields->level);
    const auto* upper = reinterpret_cast<const int32_t*>(fields->upper);
    typename S::Words low[2] = {S::zero(), S::zero()}, high[2] = {S::zero(), S::zero()};
#pragma GCC unroll 8
    for (int k = 0; k < 8 * Parts; k += 2) {
      const auto a = S::load(from + k * kStep + index[k]),
                 b = S::load(from + (k + 1) * kStep + index[k + 1]);
      const auto first = S::unpack_low(a, b), second = S::unpack_high(a, b);
      const auto pair = S::pair(level[k / 2]);
      low[0] = S::add_products(low[0], first, pair);
      low[1] = S::add_products(low[1], second, pair);
      if constexpr (kSplit<Word>) {
        const auto bytes = S::pair(upper[k / 2]);
        high[0] = S::add_products(high[0], first, bytes);
        high[1] = S::add_products(high[1], second, bytes);
      }
    }
    for (int half = 0; half < 2; ++half)
      if constexpr (kSplit<Word>)
        S::add_to(sums + half * Lanes / 2, low[half], high[half]);
      else
        S::add_to(sums + half * Lanes / 2, low[half]);
  }
}

template <class Word, int Lanes, int Parts>
void sums_of_lanes(const uint8_t* codes, int64_t row_bytes, int64_t rows, int64_t columns,
                   const int16_t* table, int, int64_t* sums) {
  static_assert(Parts <= kMostParts<Word>);
  constexpr int kStrips = 4 / Parts, kShift = std::countr_zero(2u * Lanes);
  const int64_t stride = rows + 1;  // of strips: not all in the same cache sets
  const Lines<uint8_t> room(kStrips * stride * static_cast<int64_t>(sizeof(Fields<Word, Parts>)));
  auto* fields = reinterpret_cast<Fields<Word, Parts>*>(room.get());
  const uint8_t* ahead = codes + rows * row_bytes;  // the next rows, fetched in their order
  for (int64_t i = 0; i < rows * Lanes; ++i) sums[i] = 0;
  for (int64_t c = 0; c < columns; c += 32) {
    for (int64_t r = 0; r < rows; ++r) {
      prefetch_line<Word>(ahead);
      Part level[4], index[4];
      take_apart<kShift>(Word(), codes + r * row_bytes + c * Word::kBytes, columns - c, level,
                         index);
      for (int p = 0; p < 4; ++p) {
        Fields<Word, Parts>& to = fields[p / Parts * stride + r];
        if constexpr (kSplit<Word>) {
          to.upper[p % Parts] = _mm_srai_epi16(_mm_add_epi16(level[p], _mm_set1_epi16(128)), 8);
          level[p] = _mm_sub_epi16(level[p], _mm_slli_epi16(to.upper[p % Parts], 8));
        }
        to.index[p % Parts] = index[p];
        to.level[p % Parts] = level[p];
      }
    }
    for (int s = 0; s < kStrips; ++s)
      sums_of_strip<Word, Lanes, Parts>(fields + s * stride, rows,
                                        table + (c + 8 * Parts * s) * Word::kVectors * Lanes, sums);
  }
}

}  // namespace
}  // namespace rs
