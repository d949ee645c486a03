#include "outer.h"

#include "fast.h"
#include "parallel.h"

#if RS_FAST_X86
#include "avx512.h"
#pragma GCC target("avx512bf16")

namespace rs {
namespace {

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

void pair_up(const uint16_t* x, int64_t rows, int64_t n, int64_t stride, int64_t width,
             uint32_t* to) {
  for (int64_t i = 0; i < rows; i += 2, to += width)
    for (int64_t c = 0; c < width; c += 16) {
      const uint16_t* at = x + i * stride + c;
      const __mmask16 all = lanes(width - c), mask = lanes(n - c) & all;
      _mm512_mask_storeu_epi32(to + c, all, pair(at, i + 1 < rows ? at + stride : nullptr, mask));
    }
}

// An 8 x 32 rectangle: sixteen sums in registers, each pair of g's values meeting two of x's.
RS_INLINE void rectangle(const uint32_t* g, const uint32_t* x, int64_t pairs, int64_t rows,
                         int64_t cols, float* y, int64_t stride) {
  __m512 sum[kOuterRows][2];
#pragma GCC unroll 8
  for (auto& row : sum) row[0] = row[1] = _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p, g += kOuterRows, x += kOuterCols) {
    const __m512bh left = (__m512bh)load(x), right = (__m512bh)load(x + 16);
#pragma GCC unroll 8
    for (int i = 0; i < kOuterRows; ++i) {
      const __m512bh both = (__m512bh)_mm512_set1_epi32(static_cast<int>(g[i]));
      sum[i][0] = _mm512_dpbf16_ps(sum[i][0], both, left);
      sum[i][1] = _mm512_dpbf16_ps(sum[i][1], both, right);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kOuterRows; ++i, y += stride) {
    if (i >= rows) return;
    _mm512_mask_storeu_ps(y, lanes(cols), sum[i][0]);
    _mm512_mask_storeu_ps(y + 16, lanes(cols - 16), sum[i][1]);
  }
}

// Blocks of g and of x, one after the other.
void rectangles(const uint32_t* g, const uint32_t* x, int64_t pairs, int64_t rows, int64_t cols,
                float* y, int64_t stride) {
  for (int64_t j = 0; j < cols; j += kOuterCols, x += pairs * kOuterCols)
    for (int64_t i = 0; i < rows; i += kOuterRows)
      rectangle(g + i * pairs, x, pairs, rows - i, cols - j, y + i * stride + j, stride);
}

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {

PairedBatch::PairedBatch(const uint16_t* x, int64_t rows, int64_t n, int64_t width)
    : pairs((rows + 1) / 2), width(width), values((n + width - 1) / width * width * pairs) {
  parallel_for((n + width - 1) / width, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin * width; c < end * width; c += width)
      pair_up(x + c, rows, n - c, n, width, values.get() + c * pairs);
  });
}

void outer_product(const PairedBatch& g, const PairedBatch& x, int64_t r, int64_t rows, int64_t c,
                   int64_t cols, float* y, int64_t stride) {
  rectangles(g.values.get() + r * g.pairs, x.values.get() + c * x.pairs, x.pairs, rows, cols, y,
             stride);
}

}  // namespace rs
#endif
