// The product of lanes.h on AVX-512. Included behind avx512.h, so internal to its file.
//
// A View is the codes of one format:
//   kBytes, kParts, kLane     bytes of a block, lookups, weights per lane
//   View(const int16_t* table)  registers with the table's integers, 128 of them
//   words(codes)              a block's codes as lookup() wants them
//   lookup<k>(words)          32 int16 weights
//   kScaled, scale(words)     whether 32-bit lanes have a float factor of their own, and that
// A View with a table for every row and block is View(layer) and words(codes, row, block) instead.
#pragma once

#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 warns inside its own intrinsics

#define RS_LAMBDA __attribute__((always_inline))

namespace rs {
namespace {

template <int B>
constexpr int kLaneRows = B == 1 ? 1 : 4;  // rows at a time: their blocks meet the same activations

template <class View, int B, int K = 0, class Words>
RS_INLINE void add_parts(const View& view, const Words& words, const int16_t* x, __m512i* acc) {
  if constexpr (K < View::kParts) {
    const __m512i w = view.template lookup<K>(words);
    for (int b = 0; b < B; ++b)
      acc[b] = _mm512_dpwssd_epi32(acc[b], w, load(x + (b * View::kParts + K) * 32));
    add_parts<View, B, K + 1>(view, words, x, acc);
  }
}

template <class View>
RS_INLINE auto words_of(const View& view, __m512i codes, int64_t row, int64_t block) {
  if constexpr (requires { view.words(codes, row, block); })
    return view.words(codes, row, block);
  else
    return view.words(codes);
}

template <class View, int B>
RS_INLINE void add_block(const View& view, __m512i codes, int64_t row, int64_t block,
                         const int16_t* x, __m512* total) {
  __m512i acc[B];
  for (int b = 0; b < B; ++b) acc[b] = _mm512_setzero_si512();
  const auto words = words_of(view, codes, row, block);
  add_parts<View, B>(view, words, x, acc);
  for (int b = 0; b < B; ++b) {
    const __m512 sum = _mm512_cvtepi32_ps(acc[b]);
    if constexpr (View::kScaled)
      total[b] = _mm512_fmadd_ps(sum, view.scale(words), total[b]);
    else
      total[b] = _mm512_add_ps(sum, total[b]);
  }
}

// Rows row, row + 1, ... below `end`, of which the last fills up the kLaneRows.
template <class View, int B>
void lane_rows(const View& view, const LaneProduct& p, int64_t row, int64_t end) {
  constexpr int R = kLaneRows<B>, kStep = B * View::kParts * 32;
  constexpr __mmask64 kWhole = View::kBytes == 64 ? ~0ull : (1ull << (View::kBytes % 64)) - 1;
  const auto& [layer, x, table, m, y] = p;
  const int64_t row_bytes = layer.tile_cols() * layer.tile.bytes;
  const int64_t ahead = R == 1 ? 4096 : R * row_bytes;  // bytes of software prefetch
  const int64_t full = row_bytes / View::kBytes, rest = row_bytes % View::kBytes;
  int64_t at[R];
  const uint8_t* codes[R];
  __m512 total[R][B];
  for (int r = 0; r < R; ++r) {
    at[r] = row + r < end ? row + r : end - 1;
    codes[r] = layer.codes + at[r] * row_bytes;
    for (int b = 0; b < B; ++b) total[r][b] = _mm512_setzero_ps();
  }
  const int16_t* values = x.values.get();
  for (int64_t block = 0; block < full; ++block, values += kStep) {
#pragma GCC unroll 1
    for (int r = 0; r < R; ++r) {
      _mm_prefetch(codes[r] + ahead, _MM_HINT_T0);
      add_block<View, B>(view, _mm512_maskz_loadu_epi8(kWhole, codes[r]), at[r], block, values,
                         total[r]);
      codes[r] += View::kBytes;
    }
  }
  if (rest) {
#pragma GCC unroll 1
    for (int r = 0; r < R; ++r)
      add_block<View, B>(view, _mm512_maskz_loadu_epi8((1ull << rest) - 1, codes[r]), at[r], full,
                         values, total[r]);
  }
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b)
      if (b < m)
        y[b * layer.out + at[r]] = _mm512_reduce_add_ps(total[r][b]) * x.unit[b] * table.unit;
}

template <class View>
RS_INLINE View view_of(const LaneProduct& p) {
  if constexpr (requires { View(p.layer); })
    return View(p.layer);
  else
    return View(p.table.at);
}

template <class View, int B>
void lane_product(const LaneProduct& p, int64_t row0, int64_t row1) {
  const View view = view_of<View>(p);
  for (; row0 < row1; row0 += kLaneRows<B>) lane_rows<View, B>(view, p, row0, row1);
}

template <class View>
constexpr LaneKernel kLaneKernels[4] = {lane_product<View, 1>, lane_product<View, 2>,
                                        lane_product<View, 4>, lane_product<View, 8>};

// Rows of x times decoded rows in float32. Rows::each(layer, row, visit) calls visit(i, j, w, mask)
// for 16 weights at a time, those from column j on, with a constant i that rises by one or more.
template <class Rows, int B>
void float_product(const Layer& layer, const float* x, int64_t m, float* y, int64_t row0,
                   int64_t row1) {
  constexpr int kSums = B == 1 ? 4 : 1;  // independent, so that additions need not wait
  for (int64_t row = row0; row < row1; ++row) {
    __m512 total[kSums][B];
    for (auto& sums : total)
      for (__m512& sum : sums) sum = _mm512_setzero_ps();
    Rows::each(layer, row, [&](int i, int64_t j, __m512 w, __mmask16 mask) RS_LAMBDA {
      for (int b = 0; b < B; ++b) {
        const float* from = x + (b < m ? b : m - 1) * layer.in + j;
        __m512& sum = total[i % kSums][b];
        sum = _mm512_fmadd_ps(w, _mm512_maskz_loadu_ps(mask, from), sum);
      }
    });
    for (int b = 0; b < B; ++b) {
      for (int i = 1; i < kSums; ++i) total[0][b] = _mm512_add_ps(total[0][b], total[i][b]);
      if (b < m) y[b * layer.out + row] = _mm512_reduce_add_ps(total[0][b]);
    }
  }
}
template <class Rows>
constexpr FloatKernel kFloatKernels[4] = {float_product<Rows, 1>, float_product<Rows, 2>,
                                          float_product<Rows, 4>, float_product<Rows, 8>};

// The lanes of `mask` to memory: all 32 bits of them, or the lower 16.
RS_INLINE void store_lanes(float* w, __m512i bits, __mmask16 mask) {
  _mm512_mask_storeu_epi32(w, mask, bits);
}
RS_INLINE void store_lanes(uint16_t* w, __m512i bits, __mmask16 mask) {
  _mm256_mask_storeu_epi16(w, mask, _mm512_cvtepi32_epi16(bits));
}
RS_INLINE __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? 0xFFFF : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}
RS_INLINE __mmask64 first_bytes(int64_t count) {
  return count >= 64 ? ~0ull : count <= 0 ? 0 : (1ull << count) - 1;
}

}  // namespace
}  // namespace rs
