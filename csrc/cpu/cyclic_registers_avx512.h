// Sums of cyclic codes whose dot products are looked up in registers: a column's table is four
// registers of lower and four of upper bytes, and 64 rows of codes meet it at once. Tables of rows
// of x lie apart. Included behind cyclic_loops.h, so internal to its file.
//
//   turn     the codes of 16 rows and a strip of columns become pairs of neighbouring columns by
//            rows: 16 rows to a register, a pair to its 32-bit lanes
//   Strip    of 64 rows: a column's indices in one register of bytes, in the order from which
//            unpacking the bytes looked up, and then two columns' words, returns to that of the
//            levels
#pragma once

namespace rs {
namespace {

constexpr int kGroup = 64;                // rows
constexpr int kPairs = kCyclicStrip / 2;  // of columns of a strip

template <class Word>
struct Strip {
  __m512i index[kPairs][2];
  // Of a pair's four times 16 rows; where levels are split, their lower and upper bytes.
  __m512i level[kPairs][4], upper[kSplit<Word> ? kPairs : 0][4];
};

// Rows of sixteen 32-bit lanes become columns.
RS_INLINE void transpose(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const int at = i / 4 * 8 + i % 4;
    t[at] = _mm512_shuffle_i32x4(r[at], r[at + 4], 0x88);
    t[at + 4] = _mm512_shuffle_i32x4(r[at], r[at + 4], 0xDD);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
  }
}

// A strip of sixteen rows, of which `bytes` are there; rows from `rows` on are zero.
RS_INLINE void load_rows(const uint8_t* codes, int64_t row_bytes, int64_t rows, int64_t bytes,
                         __m512i* r) {
  for (int i = 0; i < 16; ++i) r[i] = load_some(codes + i * row_bytes, i < rows ? bytes : 0);
  transpose(r);
}

// Fields of a strip of 16 rows by pairs of columns.
template <class Word>
RS_INLINE void turn(Word word, const uint8_t* codes, int64_t row_bytes, int64_t rows, int64_t left,
                    Pair* pairs) {
  __m512i r[16];
  load_rows(codes, row_bytes, rows, 2 * left, r);
#pragma GCC unroll 16
  for (int d = 0; d < kPairs; ++d) pairs[d] = fields(word, r[d]);
}
RS_INLINE void turn(Cyclic32Word word, const uint8_t* codes, int64_t row_bytes, int64_t rows,
                    int64_t left, Pair* pairs) {
  const __m512i lower = _mm512_set1_epi32(0xFFFF);
  for (int half = 0; half < 2; ++half, codes += 64, left -= 16) {
    __m512i r[16];
    load_rows(codes, row_bytes, rows, 4 * left, r);
#pragma GCC unroll 8
    for (int d = 0; d < 8; ++d) {
      const __m512i a = r[2 * d], b = r[2 * d + 1];
      // Bits of the first where the mask has ones, of the second elsewhere.
      const __m512i low = _mm512_ternarylogic_epi32(lower, a, _mm512_slli_epi32(b, 16), 0xCA);
      const __m512i high = _mm512_ternarylogic_epi32(lower, _mm512_srli_epi32(a, 16), b, 0xCA);
      pairs[8 * half + d] = fields(word, low, high);
    }
  }
}

template <class Word>
RS_INLINE void fill_strip(const uint8_t* codes, int64_t row_bytes, int64_t rows, int64_t left,
                          Strip<Word>& strip) {
  Pair pairs[4][kPairs];
  for (int g = 0; g < 4; ++g)
    turn(Word(), codes + 16 * g * row_bytes, row_bytes, rows - 16 * g, left, pairs[g]);
  const __m512i lower = _mm512_set1_epi16(255);
  for (int d = 0; d < kPairs; ++d) {
    const __m512i first = _mm512_packus_epi16(pairs[0][d].index, pairs[1][d].index);
    const __m512i second = _mm512_packus_epi16(pairs[2][d].index, pairs[3][d].index);
    strip.index[d][0] =
        _mm512_packus_epi16(_mm512_and_si512(first, lower), _mm512_and_si512(second, lower));
    strip.index[d][1] =
        _mm512_packus_epi16(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(second, 8));
    for (int g = 0; g < 4; ++g) {
      __m512i level = pairs[g][d].level;
      if constexpr (kSplit<Word>) {
        const __m512i upper = _mm512_srai_epi16(_mm512_add_epi16(level, _mm512_set1_epi16(128)), 8);
        strip.upper[d][g] = upper;
        level = _mm512_sub_epi16(level, _mm512_slli_epi16(upper, 8));
      }
      strip.level[d][g] = level;
    }
  }
}

struct ByteOrder {
  alignas(64) uint8_t even[64]{}, odd[64]{};
  constexpr ByteOrder() {
    for (int i = 0; i < 64; ++i) {
      even[i] = static_cast<uint8_t>(2 * i);
      odd[i] = static_cast<uint8_t>(2 * i + 1);
    }
  }
};
constexpr ByteOrder kByteOrder;

// Bytes of a column's dot products, to be looked up 64 at a time.
template <int Vectors>
struct Lookup {
  __m512i at[4];
  RS_INLINE __m512i operator()(__m512i index) const {
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index),
                                  _mm512_permutex2var_epi8(at[0], index, at[1]),
                                  _mm512_permutex2var_epi8(at[2], index, at[3]));
  }
};
template <>
struct Lookup<16> {
  __m512i at;
  RS_INLINE __m512i operator()(__m512i index) const { return _mm512_shuffle_epi8(at, index); }
};
template <int Vectors>
struct Column {
  Lookup<Vectors> low, high;
};

RS_INLINE void fill_column(const int16_t* dots, Column<256>& to) {
  for (int i = 0; i < 4; ++i, dots += 64) {
    const __m512i a = load(dots), b = load(dots + 32);
    to.low.at[i] = _mm512_permutex2var_epi8(a, load(kByteOrder.even), b);
    to.high.at[i] = _mm512_permutex2var_epi8(a, load(kByteOrder.odd), b);
  }
}
RS_INLINE void fill_column(const int16_t* dots, Column<16>& to) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(dots));
  to.low.at = _mm512_broadcast_i32x4(_mm256_cvtepi16_epi8(words));
  to.high.at = _mm512_broadcast_i32x4(_mm256_cvtepi16_epi8(_mm256_srli_epi16(words, 8)));
}

// sums[G * 64] += the products of strips of G groups of rows with the dot products of their
// columns. With Fetch, fetches a strip of as many rows from `ahead` on, a few at a time: memory
// takes no more.
template <class Word, int G, bool Fetch>
RS_INLINE void add_strips(const Strip<Word>* strips, const Column<Word::kVectors>* columns,
                          int64_t* sums, const uint8_t* ahead = nullptr, int64_t row_bytes = 0) {
  constexpr int kMost = 4 * kMostParts<Word>;  // pairs that sum up to 32 bits
  for (int first = 0; first < kPairs; first += kMost) {
    __m512i low[G][4], high[G][4];
#pragma GCC unroll 2
    for (int i = 0; i < G; ++i)
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) low[i][g] = high[i][g] = _mm512_setzero_si512();
    for (int d = first; d < first + kMost; ++d, columns += 2) {
#pragma GCC unroll 4
      for (int i = 0; Fetch && i < G * kGroup / kPairs; ++i, ahead += row_bytes)
        for (int at = 0; at < kCyclicStrip * Word::kBytes; at += 64)
          _mm_prefetch(ahead + at, _MM_HINT_T1);
      __m512i words[G][2][2];
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) {
        const Column<Word::kVectors> column = columns[c];
#pragma GCC unroll 2
        for (int i = 0; i < G; ++i) {
          const __m512i index = strips[i].index[d][c];
          const __m512i a = column.low(index), b = column.high(index);
          words[i][c][0] = _mm512_unpacklo_epi8(a, b);
          words[i][c][1] = _mm512_unpackhi_epi8(a, b);
        }
      }
#pragma GCC unroll 2
      for (int i = 0; i < G; ++i)
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g) {
          const __m512i a = words[i][0][g / 2], b = words[i][1][g / 2];
          const __m512i dots = g % 2 ? _mm512_unpackhi_epi16(a, b) : _mm512_unpacklo_epi16(a, b);
          low[i][g] = _mm512_dpwssd_epi32(low[i][g], dots, strips[i].level[d][g]);
          if constexpr (kSplit<Word>)
            high[i][g] = _mm512_dpwssd_epi32(high[i][g], dots, strips[i].upper[d][g]);
        }
    }
#pragma GCC unroll 2
    for (int i = 0; i < G; ++i)
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g)
        if constexpr (kSplit<Word>)
          add_to(sums + i * kGroup + 16 * g, low[i][g], high[i][g]);
        else
          add_to(sums + i * kGroup + 16 * g, low[i][g]);
  }
}

template <class Word>
void sums_in_registers(const uint8_t* codes, int64_t row_bytes, int64_t rows, int64_t columns,
                       const int16_t* table, int lanes, int64_t* sums) {
  const int64_t groups = (rows + kGroup - 1) / kGroup;
  const int64_t apart = (columns + kCyclicStrip - 1) / kCyclicStrip * kCyclicStrip * Word::kVectors;
  // A strip of all rows, for the rows of x behind the first.
  const Lines<uint8_t> room((lanes > 1 ? groups : 1) * static_cast<int64_t>(sizeof(Strip<Word>)));
  auto* strips = reinterpret_cast<Strip<Word>*>(room.get());
  const Lines<int64_t> wide(lanes * groups * kGroup);
  for (int64_t c = 0; c < columns; c += kCyclicStrip, table += kCyclicStrip * Word::kVectors) {
    const int64_t next = c + kCyclicStrip;
    const uint8_t* ahead = codes + (next < columns ? next * Word::kBytes : rows * row_bytes);
    for (int b = 0; b < lanes; ++b) {
      Column<Word::kVectors> looked_up[kCyclicStrip];
      for (int i = 0; i < kCyclicStrip; ++i)
        fill_column(table + b * apart + i * Word::kVectors, looked_up[i]);
      int64_t* to = wide.get() + b * groups * kGroup;
      int64_t g = 0;
      for (; b == 0 && g < groups; ++g) {
        const int64_t r = g * kGroup;
        Strip<Word>& strip = strips[lanes > 1 ? g : 0];
        fill_strip(codes + r * row_bytes + c * Word::kBytes, row_bytes, rows - r, columns - c,
                   strip);
        add_strips<Word, 1, true>(&strip, looked_up, to + r, ahead + r * row_bytes, row_bytes);
      }
      for (; g + 2 <= groups; g += 2)
        add_strips<Word, 2, false>(strips + g, looked_up, to + g * kGroup);
      if (g < groups) add_strips<Word, 1, false>(strips + g, looked_up, to + g * kGroup);
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int b = 0; b < lanes; ++b) sums[r * lanes + b] = wide[b * groups * kGroup + r];
}

}  // namespace
}  // namespace rs
