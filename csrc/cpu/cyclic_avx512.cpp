// Sums of cyclic codes on AVX-512, 64 rows at a time and a cache line of codes of each.
//
// Four squares of 16 rows x 64 bytes are transposed so that a 32-bit lane holds the codes of one
// row, and taken apart into levels and indices once for the whole batch. Then every column of 64
// rows is looked up at once: a column's 256 dot products are two planes of bytes, the lower and the
// upper; vpermi2b looks up 128 of a plane and the top bit of the index chooses. Unpacking makes
// words of the planes and pairs of neighbouring columns of the words; vpdpwssd multiplies by the
// levels and adds the pair. Levels of more than 11 bits would overflow: there the dot products are
// split into bytes again. Of a compound word, two columns' dot products are one register.
#include "cyclic_product.h"
#include "fast.h"

#if RS_FAST_X86
#include "avx512.h"

namespace rs {
namespace {

constexpr __mmask32 kOdd = 0xAAAAAAAA;
constexpr int kSquares = 4, kGroup = 16 * kSquares;  // rows
// Rows whose fields are kept while the tables of the batch pass: 12 KB of them are in the first
// cache with one table, 96 KB in the second, where fewer passes over the tables pay for it.
constexpr int64_t kFewRows = 128, kManyRows = 1024;

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

// plane[index] for every byte.
RS_INLINE __m512i lookup256(const uint8_t* plane, __m512i index, __mmask64 upper_half) {
  return _mm512_mask_blend_epi8(
      upper_half, _mm512_permutex2var_epi8(load(plane), index, load(plane + 64)),
      _mm512_permutex2var_epi8(load(plane + 128), index, load(plane + 192)));
}

RS_INLINE __m512i turn_of(__m512i words) {  // phase in bits 12 to 15, diff in 10 and 11
  const __m512i diff = _mm512_and_si512(_mm512_srli_epi16(words, 8), _mm512_set1_epi16(12));
  return _mm512_add_epi16(_mm512_srli_epi16(words, 12), diff);  // below 32: the table repeats
}
RS_INLINE __m512i level(__m512i turn, __m512i amp) {
  return _mm512_mullo_epi16(_mm512_permutexvar_epi16(turn, load(kTurns.at)), amp);
}

// A 32-bit sum for each row of a square.
struct Narrow {
  __m512i sum[kSquares];
  RS_INLINE void clear() {
    for (__m512i& square : sum) square = _mm512_setzero_si512();
  }
  RS_INLINE void add(int square, __m512i level, __m512i dot) {
    sum[square] = _mm512_dpwssd_epi32(sum[square], level, dot);
  }
  RS_INLINE __m512i total(int square, int half) const {  // of eight rows
    return _mm512_cvtepi32_epi64(half ? _mm512_extracti64x4_epi64(sum[square], 1)
                                      : _mm512_castsi512_si256(sum[square]));
  }
};
struct Split {
  Narrow high, low;
  RS_INLINE void clear() {
    high.clear();
    low.clear();
  }
  RS_INLINE void add(int square, __m512i level, __m512i dot) {
    const __m512i byte = _mm512_srai_epi16(_mm512_add_epi16(dot, _mm512_set1_epi16(128)), 8);
    high.add(square, level, byte);
    low.add(square, level, _mm512_sub_epi16(dot, _mm512_slli_epi16(byte, 8)));
  }
  RS_INLINE __m512i total(int square, int half) const {
    return _mm512_add_epi64(_mm512_slli_epi64(high.total(square, half), 8),
                            low.total(square, half));
  }
};

// Two neighbouring columns of 64 rows. Levels: both columns' words in the 32-bit lane of a row.
// Indices: bytes of one column each, so placed that unpacking returns them to the rows' lanes; of a
// compound word like the levels.
template <class Word>
struct Fields {
  __m512i level[kSquares], index[Word::kVectors == 16 ? kSquares : 2];
};

// Bytes in the low bits of 32-bit lanes: byte 4 s + t of 128-bit lane q is lane 4 q + t of square
// s.
RS_INLINE __m512i bytes_of(const __m512i* lanes) {
  return _mm512_packus_epi16(_mm512_packus_epi32(lanes[0], lanes[1]),
                             _mm512_packus_epi32(lanes[2], lanes[3]));
}

// squares[s][i]: the i-th 32 bits of a line of every row of square s.
RS_INLINE void take_apart(const __m512i (*squares)[16], Fields<Cyclic16Word>* to) {
  const __m512i amps = _mm512_set1_epi16(15), byte = _mm512_set1_epi32(255);
  for (int i = 0; i < 16; ++i, ++to) {
    __m512i index[2][kSquares];
    for (int s = 0; s < kSquares; ++s) {
      const __m512i w = squares[s][i];
      to->level[s] = level(_mm512_srli_epi16(w, 12), _mm512_and_si512(w, amps));
      index[0][s] = _mm512_and_si512(_mm512_srli_epi32(w, 4), byte);
      index[1][s] = _mm512_and_si512(_mm512_srli_epi32(w, 20), byte);
    }
    for (int c = 0; c < 2; ++c) to->index[c] = bytes_of(index[c]);
  }
}
RS_INLINE void take_apart(const __m512i (*squares)[16], Fields<CyclicCompoundWord>* to) {
  const __m512i vectors = _mm512_set1_epi16(15), second = _mm512_set1_epi32(16 << 16),
                amps = _mm512_set1_epi16(63);
  for (int i = 0; i < 16; ++i, ++to)
    for (int s = 0; s < kSquares; ++s) {
      const __m512i w = squares[s][i];
      to->level[s] = level(turn_of(w), _mm512_and_si512(_mm512_srli_epi16(w, 4), amps));
      to->index[s] = _mm512_or_si512(_mm512_and_si512(w, vectors), second);
    }
}
RS_INLINE void take_apart(const __m512i (*squares)[16], Fields<Cyclic32Word>* to) {
  const __m512i byte = _mm512_set1_epi32(255);
  for (int i = 0; i < 16; i += 2, ++to) {
    __m512i index[2][kSquares];
    for (int s = 0; s < kSquares; ++s) {
      const __m512i a = squares[s][i], b = squares[s][i + 1];
      const __m512i low = _mm512_mask_blend_epi16(kOdd, a, _mm512_slli_epi32(b, 16)),
                    high = _mm512_mask_blend_epi16(kOdd, _mm512_srli_epi32(a, 16), b);
      to->level[s] = level(turn_of(high), _mm512_srli_epi16(low, 8));
      index[0][s] = _mm512_and_si512(a, byte);
      index[1][s] = _mm512_and_si512(b, byte);
    }
    for (int c = 0; c < 2; ++c) to->index[c] = bytes_of(index[c]);
  }
}

// Adds the two columns whose dot products begin at `table`.
template <class Word, class Sums>
RS_INLINE void add_columns(const Fields<Word>& f, const int16_t* table, Sums& sums) {
  if constexpr (Word::kVectors == 16) {
    for (int s = 0; s < kSquares; ++s)
      sums.add(s, f.level[s], _mm512_permutexvar_epi16(f.index[s], load(table)));
  } else {
    __m512i words[2][2];
    for (int c = 0; c < 2; ++c) {
      const auto* planes = reinterpret_cast<const uint8_t*>(table + c * Word::kVectors);
      const __mmask64 upper_half = _mm512_movepi8_mask(f.index[c]);
      const __m512i low = lookup256(planes, f.index[c], upper_half),
                    high = lookup256(planes + 256, f.index[c], upper_half);
      words[c][0] = _mm512_unpacklo_epi8(low, high);
      words[c][1] = _mm512_unpackhi_epi8(low, high);
    }
    for (int s = 0; s < kSquares; s += 2) {
      const __m512i a = words[0][s / 2], b = words[1][s / 2];
      sums.add(s, f.level[s], _mm512_unpacklo_epi16(a, b));
      sums.add(s + 1, f.level[s + 1], _mm512_unpackhi_epi16(a, b));
    }
  }
}

// sums += the sums of 64 rows, of which `rows` are there.
template <class Sums>
RS_INLINE void add_to(int64_t* sums, int64_t rows, const Sums& acc) {
  for (int part = 0; part < 2 * kSquares && 8 * part < rows; ++part, sums += 8) {
    const int64_t left = rows - 8 * part;
    const __mmask8 lanes = static_cast<__mmask8>(left >= 8 ? 255 : (1 << left) - 1);
    const __m512i sum =
        _mm512_add_epi64(_mm512_maskz_loadu_epi64(lanes, sums), acc.total(part / 2, part % 2));
    _mm512_mask_storeu_epi64(sums, lanes, sum);
  }
}

template <class Word, class Sums>
void sums_of_rows(const uint8_t* codes, int64_t row_bytes, int64_t rows, int64_t columns,
                  const int16_t* const* tables, int64_t batch, int64_t* sums) {
  constexpr int64_t kColumns = 64 / Word::kBytes, kPairs = kColumns / 2;
  const uint8_t* ahead = codes + rows * row_bytes;  // the next rows, fetched in their order
  for (int64_t i = 0; i < batch * rows; ++i) sums[i] = 0;
  Fields<Word> fields[kManyRows / kGroup * kPairs];
  const int64_t step = batch == 1 ? kFewRows : kManyRows;
  for (int64_t r0 = 0; r0 < rows; r0 += step) {
    const int64_t r1 = rows - r0 < step ? rows : r0 + step;
    for (int64_t c = 0; c < columns; c += kColumns) {
      const int64_t bytes = (columns - c) * Word::kBytes;
      const __mmask64 mask = bytes >= 64 ? ~0ull : (1ull << bytes) - 1;
      Fields<Word>* to = fields;
      for (int64_t r = r0; r < r1; r += kGroup, to += kPairs) {
        const uint8_t* line[kGroup];
        for (int i = 0; i < kGroup; ++i, ahead += 64) {
          line[i] = codes + (r + i < r1 ? r + i : r1 - 1) * row_bytes + c * Word::kBytes;
          _mm_prefetch(ahead, _MM_HINT_T1);
        }
        __m512i squares[kSquares][16];
        for (int s = 0; s < kSquares; ++s) transpose(line + 16 * s, mask, squares[s]);
        take_apart(squares, to);
      }
      for (int64_t x = 0; x < batch; ++x) {
        const Fields<Word>* from = fields;
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
