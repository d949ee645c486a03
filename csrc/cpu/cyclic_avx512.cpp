// Sums of cyclic codes on AVX-512, 32 rows at a time and a cache line of codes of each.
//
// Two squares of 16 rows x 64 bytes are transposed so that a 32-bit lane holds the codes of one
// row, then every column of 32 rows is looked up at once: a column's 256 dot products are eight
// registers of 16-bit words, four vpermi2w look up 64 each and two bits of the index choose.
// vpdpwssd multiplies by the level and adds two neighbouring columns of a row. Levels of more than
// 11 bits would overflow: there the dot products are split into their upper and lower byte.
#include "cyclic_product.h"
#include "fast.h"

#if RS_FAST_X86
#include "avx512.h"

namespace rs {
namespace {

constexpr __mmask32 kOdd = 0xAAAAAAAA;
constexpr int kGroup = 32;      // rows
constexpr int64_t kRows = 128;  // whose fields, 16 KB, are in the first cache with one table

struct Turns {
  alignas(64) int16_t at[32]{};
  constexpr Turns() {
    for (int i = 0; i < 32; ++i) at[i] = kCyclic[0][i & 15];
  }
};
constexpr Turns kTurns;

// Lane r of out[i] is lane i of the line at rows[r].
RS_INLINE void transpose(const uint8_t* const* rows, __mmask64 mask, __m512i* out) {
  __m512i a[16], b[16];
  for (int r = 0; r < 16; ++r) a[r] = _mm512_maskz_loadu_epi8(mask, rows[r]);
  for (int r = 0; r < 16; r += 2) {
    b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
    b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
  }
  for (int r = 0; r < 16; r += 4)
    for (int i = 0; i < 2; ++i) {
      a[r + 2 * i] = _mm512_unpacklo_epi64(b[r + i], b[r + i + 2]);
      a[r + 2 * i + 1] = _mm512_unpackhi_epi64(b[r + i], b[r + i + 2]);
    }
  // a[4 q + i] holds columns i, i + 4, i + 8, i + 12 of rows 4 q to 4 q + 3.
  for (int i = 0; i < 4; ++i) {
    const __m512i low0 = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88),
                  low1 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88),
                  high0 = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xDD),
                  high1 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xDD);
    out[i] = _mm512_shuffle_i32x4(low0, low1, 0x88);
    out[i + 8] = _mm512_shuffle_i32x4(low0, low1, 0xDD);
    out[i + 4] = _mm512_shuffle_i32x4(high0, high1, 0x88);
    out[i + 12] = _mm512_shuffle_i32x4(high0, high1, 0xDD);
  }
}

// Words of 32-bit lanes: the lower of a and b in turn, and the upper.
RS_INLINE __m512i lower(__m512i a, __m512i b) {
  return _mm512_mask_blend_epi16(kOdd, a, _mm512_slli_epi32(b, 16));
}
RS_INLINE __m512i upper(__m512i a, __m512i b) {
  return _mm512_mask_blend_epi16(kOdd, _mm512_srli_epi32(a, 16), b);
}

// table[word & 255] for every word.
RS_INLINE __m512i lookup256(const int16_t* table, __m512i index) {
  __m512i part[4];
  for (int i = 0; i < 4; ++i)
    part[i] = _mm512_permutex2var_epi16(load(table + 64 * i), index, load(table + 64 * i + 32));
  const __mmask32 second = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
  return _mm512_mask_blend_epi16(_mm512_test_epi16_mask(index, _mm512_set1_epi16(128)),
                                 _mm512_mask_blend_epi16(second, part[0], part[1]),
                                 _mm512_mask_blend_epi16(second, part[2], part[3]));
}

RS_INLINE __m512i turn_of(__m512i words) {  // phase in bits 12 to 15, diff in 10 and 11
  const __m512i diff = _mm512_and_si512(_mm512_srli_epi16(words, 8), _mm512_set1_epi16(12));
  return _mm512_add_epi16(_mm512_srli_epi16(words, 12), diff);  // below 32: the table repeats
}
RS_INLINE __m512i level(__m512i turn, __m512i amp) {
  return _mm512_mullo_epi16(_mm512_permutexvar_epi16(turn, load(kTurns.at)), amp);
}

// Rows 0 to 15 and 16 to 31, a 32-bit sum each.
struct Narrow {
  __m512i sum[2];
  RS_INLINE void clear() { sum[0] = sum[1] = _mm512_setzero_si512(); }
  RS_INLINE void add(int half, __m512i level, __m512i dot) {
    sum[half] = _mm512_dpwssd_epi32(sum[half], level, dot);
  }
  RS_INLINE __m512i total(int half, int quarter) const {
    return _mm512_cvtepi32_epi64(quarter ? _mm512_extracti64x4_epi64(sum[half], 1)
                                         : _mm512_castsi512_si256(sum[half]));
  }
};
struct Split {
  Narrow high, low;
  RS_INLINE void clear() {
    high.clear();
    low.clear();
  }
  RS_INLINE void add(int half, __m512i level, __m512i dot) {
    const __m512i byte = _mm512_srai_epi16(_mm512_add_epi16(dot, _mm512_set1_epi16(128)), 8);
    high.add(half, level, byte);
    low.add(half, level, _mm512_sub_epi16(dot, _mm512_slli_epi16(byte, 8)));
  }
  RS_INLINE __m512i total(int half, int quarter) const {
    return _mm512_add_epi64(_mm512_slli_epi64(high.total(half, quarter), 8),
                            low.total(half, quarter));
  }
};

// Two columns of 32 rows: levels by rows (0 to 15, 16 to 31), both columns in a 32-bit lane, and
// indices by column (both halves of the rows in a lane), or by rows when compound.
struct Fields {
  __m512i level[2], index[2];
};

RS_INLINE void take_apart(Cyclic16Word, const __m512i* a, const __m512i* b, Fields* to) {
  const __m512i amps = _mm512_set1_epi16(15);
  for (int i = 0; i < 16; ++i, ++to) {
    to->level[0] = level(_mm512_srli_epi16(a[i], 12), _mm512_and_si512(a[i], amps));
    to->level[1] = level(_mm512_srli_epi16(b[i], 12), _mm512_and_si512(b[i], amps));
    to->index[0] = _mm512_srli_epi16(lower(a[i], b[i]), 4);
    to->index[1] = _mm512_srli_epi16(upper(a[i], b[i]), 4);
  }
}
RS_INLINE void take_apart(CyclicCompoundWord, const __m512i* a, const __m512i* b, Fields* to) {
  const __m512i vectors = _mm512_set1_epi16(15), second = _mm512_set1_epi32(16 << 16),
                amps = _mm512_set1_epi16(63);
  for (int i = 0; i < 16; ++i, ++to) {
    const __m512i square[2] = {a[i], b[i]};
    for (int half = 0; half < 2; ++half) {
      const __m512i w = square[half];
      to->level[half] = level(turn_of(w), _mm512_and_si512(_mm512_srli_epi16(w, 4), amps));
      to->index[half] = _mm512_or_si512(_mm512_and_si512(w, vectors), second);
    }
  }
}
RS_INLINE void take_apart(Cyclic32Word, const __m512i* a, const __m512i* b, Fields* to) {
  for (int i = 0; i < 16; i += 2, ++to) {
    __m512i f[2];
    for (int c = 0; c < 2; ++c) {
      to->index[c] = lower(a[i + c], b[i + c]);  // the index is in the low byte
      f[c] = level(turn_of(upper(a[i + c], b[i + c])), _mm512_srli_epi16(to->index[c], 8));
    }
    to->level[0] = lower(f[0], f[1]);
    to->level[1] = upper(f[0], f[1]);
  }
}

// Adds the two columns whose dot products begin at `table`.
template <class Word, class Sums>
RS_INLINE void add_columns(const Fields& f, const int16_t* table, Sums& sums) {
  if constexpr (Word::kVectors == 16) {  // those of both columns in one register
    for (int half = 0; half < 2; ++half)
      sums.add(half, f.level[half], _mm512_permutexvar_epi16(f.index[half], load(table)));
  } else {
    const __m512i d0 = lookup256(table, f.index[0]), d1 = lookup256(table + 256, f.index[1]);
    sums.add(0, f.level[0], lower(d0, d1));
    sums.add(1, f.level[1], upper(d0, d1));
  }
}

// sums[r..] += the sums of 32 rows, of which `rows` are there.
template <class Sums>
RS_INLINE void add_to(int64_t* sums, int64_t rows, const Sums& acc) {
  for (int part = 0; part < 4 && 8 * part < rows; ++part) {
    const int64_t left = rows - 8 * part;
    const __mmask8 lanes = static_cast<__mmask8>(left >= 8 ? 255 : (1 << left) - 1);
    int64_t* to = sums + 8 * part;
    const __m512i sum =
        _mm512_add_epi64(_mm512_maskz_loadu_epi64(lanes, to), acc.total(part / 2, part % 2));
    _mm512_mask_storeu_epi64(to, lanes, sum);
  }
}

template <class Word, class Sums>
void sums_of_rows(const uint8_t* codes, int64_t row_bytes, int64_t rows, int64_t columns,
                  const int16_t* const* tables, int64_t batch, int64_t* sums) {
  constexpr int64_t kColumns = 64 / Word::kBytes, kPairs = kColumns / 2;
  const uint8_t* ahead = codes + rows * row_bytes;  // the next rows, fetched in their order
  for (int64_t i = 0; i < batch * rows; ++i) sums[i] = 0;
  Fields fields[kRows / kGroup * kPairs];
  for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
    const int64_t r1 = rows - r0 < kRows ? rows : r0 + kRows;
    for (int64_t c = 0; c < columns; c += kColumns) {
      const int64_t bytes = (columns - c) * Word::kBytes;
      const __mmask64 mask = bytes >= 64 ? ~0ull : (1ull << bytes) - 1;
      Fields* to = fields;
      for (int64_t r = r0; r < r1; r += kGroup, to += kPairs) {
        const uint8_t* line[kGroup];
        for (int i = 0; i < kGroup; ++i, ahead += 64) {
          line[i] = codes + (r + i < r1 ? r + i : r1 - 1) * row_bytes + c * Word::kBytes;
          _mm_prefetch(ahead, _MM_HINT_T1);
        }
        __m512i a[16], b[16];
        transpose(line, mask, a);
        transpose(line + 16, mask, b);
        take_apart(Word(), a, b, to);
      }
      for (int64_t x = 0; x < batch; ++x) {
        const Fields* from = fields;
        for (int64_t r = r0; r < r1; r += kGroup) {
          const int16_t* table = tables[x] + c * Word::kVectors;
          Sums acc;
          acc.clear();
#pragma GCC unroll 1
          for (int i = 0; i < kPairs; ++i, ++from, table += 2 * Word::kVectors)
            add_columns<Word>(*from, table, acc);
          add_to(sums + x * rows + r, r1 - r, acc);
        }
      }
    }
  }
}

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

void cyclic_scatter_avx512(const int16_t* level, const uint8_t* bin, const int8_t* g, int64_t rows,
                           int32_t* bins) {
  scatter(level, bin, g, rows, bins);
}

RS_CYCLIC_SUMS(avx512, Cyclic16Word) {
  sums_of_rows<Cyclic16Word, Narrow>(codes, row_bytes, rows, columns, tables, batch, sums);
}
RS_CYCLIC_SUMS(avx512, CyclicCompoundWord) {
  sums_of_rows<CyclicCompoundWord, Split>(codes, row_bytes, rows, columns, tables, batch, sums);
}
RS_CYCLIC_SUMS(avx512, Cyclic32Word) {
  sums_of_rows<Cyclic32Word, Split>(codes, row_bytes, rows, columns, tables, batch, sums);
}

}  // namespace rs
#endif
