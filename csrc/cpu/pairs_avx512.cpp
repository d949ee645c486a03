#include "pairs.h"

#include <cstring>

#include "fast.h"
#include "parallel.h"

#if RS_FAST_X86
#include "avx512.h"
#pragma GCC target("avx512bf16")

namespace rs {
namespace {

constexpr int64_t kDepth = 1024;  // pairs summed at a time: 128 KB of a right operand

// The first `count` lanes.
RS_INLINE __mmask16 lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xFFFF : count <= 0 ? 0 : (1 << count) - 1);
}

// Sixteen columns of two rows of which the second may be missing.
RS_INLINE __m512i pair(const uint16_t* first, const uint16_t* second, __mmask16 mask) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, first));
  if (!second) return low;
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, second));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

void pair_all(const uint16_t* x, int64_t rows, int64_t n, int64_t stride, int64_t width,
              uint32_t* to, int64_t apart) {
  for (; n > 0; x += width, n -= width, to += apart)
    for (int64_t i = 0; i < rows; i += 2)
      for (int64_t c = 0; c < width; c += 16) {
        const uint16_t* at = x + i * stride + c;
        const __mmask16 all = lanes(width - c), mask = lanes(n - c) & all;
        _mm512_mask_storeu_epi32(to + i / 2 * width + c, all,
                                 pair(at, i + 1 < rows ? at + stride : nullptr, mask));
      }
}

// Eight rows by one or two vectors of columns, the sums in registers.
// Packed: pairs of the rows lie side by side, and otherwise those of a row.
template <bool Packed, int Vectors>
void rectangle(const uint32_t* a, int64_t row, const uint32_t* b, int64_t pairs, int64_t rows,
               int64_t cols, float* y, int64_t stride, bool add) {
  const __mmask16 masks[2] = {lanes(cols), lanes(cols - 16)};
  __m512 sum[kPairRows][Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < kPairRows; ++i)
    for (int j = 0; j < Vectors; ++j)
      sum[i][j] = add && i < rows ? _mm512_maskz_loadu_ps(masks[j], y + i * stride + 16 * j)
                                  : _mm512_setzero_ps();
  const uint32_t* from[kPairRows];  // rows that are not there read the first
  for (int i = 0; i < kPairRows; ++i) from[i] = Packed ? a + i : i < rows ? a + i * row : a;
  for (int64_t p = 0; p < pairs; ++p, b += kPairCols) {
    __m512bh right[Vectors];
    for (int j = 0; j < Vectors; ++j) right[j] = (__m512bh)load(b + 16 * j);
#pragma GCC unroll 8
    for (int i = 0; i < kPairRows; ++i) {
      const uint32_t both = from[i][Packed ? p * kPairRows : p];
      const __m512bh wide = (__m512bh)_mm512_set1_epi32(static_cast<int>(both));
      for (int j = 0; j < Vectors; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], wide, right[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kPairRows; ++i)
    for (int j = 0; j < Vectors; ++j)
      if (i < rows) _mm512_mask_storeu_ps(y + i * stride + 16 * j, masks[j], sum[i][j]);
}

template <bool Packed>
void multiply(LeftPairs a, const uint32_t* b, int64_t apart, int64_t pairs, int64_t rows,
              int64_t cols, float* y, int64_t stride, bool add) {
  int64_t p = 0;
  do {  // of no pairs the product is zero
    const int64_t depth = pairs - p < kDepth ? pairs - p : kDepth;
    for (int64_t j = 0; j < cols; j += kPairCols) {
      const auto part = cols - j > 16 ? rectangle<Packed, 2> : rectangle<Packed, 1>;
      for (int64_t i = 0; i < rows; i += kPairRows)
        part(a.at + i / kPairRows * a.group + p * a.pair, a.row,
             b + j / kPairCols * apart + p * kPairCols, depth, rows - i, cols - j,
             y + i * stride + j, stride, add || p);
    }
    p += kDepth;
  } while (p < pairs);
}

// Four rows of w by N of x, both along the summed dimension.
template <int N>
void dots(const uint16_t* w, const uint16_t* x, int64_t n, int64_t rows, float* y, int64_t stride) {
  constexpr int kRows = 4, kWide = 32;
  __m512 sums[kRows][N];
  for (auto& row : sums)
    for (__m512& one : row) one = _mm512_setzero_ps();
  const uint16_t* from[kRows];  // rows that are not there read the first
  for (int i = 0; i < kRows; ++i) from[i] = i < rows ? w + i * n : w;
  for (int64_t k = 0; k < n; k += kWide) {
    const __mmask32 mask = n - k < kWide ? (1u << (n - k)) - 1 : ~0u;
    __m512bh right[N];
    for (int j = 0; j < N; ++j) right[j] = (__m512bh)_mm512_maskz_loadu_epi16(mask, x + j * n + k);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const __m512bh left = (__m512bh)_mm512_maskz_loadu_epi16(mask, from[i] + k);
      for (int j = 0; j < N; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], left, right[j]);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < N; ++j)
      if (i < rows) y[i * stride + j] = _mm512_reduce_add_ps(sums[i][j]);
}

}  // namespace

void dot_product(const uint16_t* w, const uint16_t* x, int64_t n, int64_t rows, int64_t cols,
                 float* y, int64_t stride) {
  using Part = void (*)(const uint16_t*, const uint16_t*, int64_t, int64_t, float*, int64_t);
  constexpr Part parts[kDotCols] = {dots<1>, dots<2>, dots<3>, dots<4>};
  for (int64_t i = 0; i < rows; i += 4)
    parts[cols - 1](w + i * n, x, n, rows - i, y + i * stride, stride);
}

}  // namespace rs

#pragma GCC pop_options

namespace rs {

void pair_rows(const uint16_t* x, int64_t rows, int64_t n, int64_t stride, int64_t width,
               uint32_t* to, int64_t apart) {
  pair_all(x, rows, n, stride, width, to, apart);
}

void pair_columns(const uint16_t* x, int64_t rows, int64_t stride, int64_t pairs, int64_t width,
                  uint32_t* to) {
  constexpr int64_t kLine = 16;  // pairs of a row at a time: a line of the cache
  const int64_t lines = (pairs + kLine - 1) / kLine;
  parallel_for((rows + width - 1) / width * lines, 8, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t first = at / lines * width, p = at % lines * kLine;
      const int64_t count = std::min(kLine, pairs - p);
      uint32_t* block = to + first * pairs + p * width;
      for (int64_t i = 0; i < width; ++i) {
        uint32_t line[kLine] = {};
        if (first + i < rows)
          std::memcpy(line, x + (first + i) * stride + 2 * p, static_cast<size_t>(count) * 4);
        for (int64_t q = 0; q < count; ++q) block[q * width + i] = line[q];
      }
    }
  });
}

void pair_product(LeftPairs a, const uint32_t* b, int64_t apart, int64_t pairs, int64_t rows,
                  int64_t cols, float* y, int64_t stride, bool add) {
  (a.row == 1 ? multiply<true> : multiply<false>)(a, b, apart, pairs, rows, cols, y, stride, add);
}

PairedBatch::PairedBatch(const uint16_t* x, int64_t rows, int64_t n, int64_t width)
    : pairs((rows + 1) / 2), width(width), values((n + width - 1) / width * width * pairs) {
  parallel_for(n, width, [&](int64_t begin, int64_t end) {
    pair_rows(x + begin, rows, end - begin, n, width, values.get() + begin * pairs, pairs * width);
  });
}

}  // namespace rs
#endif
