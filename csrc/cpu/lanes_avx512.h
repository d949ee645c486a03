// The product of lanes.h on AVX-512. Included behind avx512.h, so internal to its file.
//
// A View is the codes of one format:
//   kBytes, kParts, kLane     bytes of a block, lookups, weights per lane
//   View(const int16_t* table)  registers with the table's integers, 128 of them
//   words(codes)              a block's codes as lookup() wants them
//   lookup<k>(words)          32 int16 weights
//   kScaled, scale(words)     whether 32-bit lanes have a float factor of their own, and that
//   kPrepared                 whether rows have tables of their own. Then it is View(layer),
//     prepare(row, r, scratch) makes those of place r before words(codes, row, r, block, scratch)
#pragma once

#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 warns inside its own intrinsics

namespace rs {
namespace {

// Rows in registers, whose words meet an activation once it is loaded, and sets of such rows, which
// meet the activations of a block while they are in the first-level cache.
constexpr int kLaneRows = 2, kLaneSets = 4;

template <class View, int B, int R, int K = 0, class Words>
RS_INLINE void add_parts(const View& view, const Words* words, const int16_t* x,
                         __m512i (*acc)[B]) {
  if constexpr (K < View::kParts) {
    __m512i w[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) w[r] = view.template lookup<K>(words[r]);
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      __m512i values = load(x + (b * View::kParts + K) * 32);
      if constexpr (R > 1) asm("" : "+v"(values));  // or gcc loads them again for every row
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r][b] = _mm512_dpwssd_epi32(acc[r][b], w[r], values);
    }
    add_parts<View, B, R, K + 1>(view, words, x, acc);
  }
}

template <class View, class Words, int B, int R>
RS_INLINE void add_block(const View& view, const Words (&words)[R], const int16_t* x,
                         __m512 (*total)[B]) {
  __m512i acc[R][B];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) acc[r][b] = _mm512_setzero_si512();
  asm("" : "+r"(x));  // or gcc loads all activations before the sets, and spills them
  add_parts<View, B, R>(view, words, x, acc);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      const __m512 sum = _mm512_cvtepi32_ps(acc[r][b]);
      if constexpr (View::kScaled)
        total[r][b] = _mm512_fmadd_ps(sum, view.scale(words[r]), total[r][b]);
      else
        total[r][b] = _mm512_add_ps(sum, total[r][b]);
    }
}

template <class View>
constexpr __mmask64 kWholeBlock = View::kBytes == 64 ? ~0ull : (1ull << (View::kBytes % 64)) - 1;

// A block's codes as lookup() wants them, for the row in place r.
template <class View>
RS_INLINE auto words_of(const View& view, const LaneProduct& p, int64_t row, int r, int64_t block,
                        __m512i codes) {
  if constexpr (View::kPrepared)
    return view.words(codes, row, r, block, p.scratch);
  else
    return view.words(codes);
}

// The factor of a row's integers in place r.
template <class View>
RS_INLINE float unit_of(const View& view, const LaneProduct& p, int64_t row, int r) {
  if constexpr (View::kPrepared)
    return view.prepare(row, r, p.scratch);
  else
    return p.table.unit;
}

// One row of codes with one of x. Codes come to the second-level cache first: misses of the first
// are too few at a time to keep memory busy.
template <class View>
void lane_row(const View& view, const LaneProduct& p, int64_t row) {
  constexpr int64_t kAhead = 2048, kFarAhead = 8192;  // bytes of software prefetch
  const int64_t row_bytes = p.layer.tile_cols() * p.layer.tile.bytes;
  const int64_t full = row_bytes / View::kBytes, rest = row_bytes % View::kBytes;
  const uint8_t* codes = p.layer.codes + row * row_bytes;
  const int16_t* values = p.x.values.get();
  const float unit = unit_of(view, p, row, 0);
  __m512 total[1][1] = {{_mm512_setzero_ps()}};
  for (int64_t block = 0; block < full; ++block, codes += View::kBytes) {
    _mm_prefetch(codes + kAhead, _MM_HINT_T0);
    _mm_prefetch(codes + kFarAhead, _MM_HINT_T1);
    const __m512i bytes = _mm512_maskz_loadu_epi8(kWholeBlock<View>, codes);
    const decltype(words_of(view, p, row, 0, block, bytes)) words[] = {
        words_of(view, p, row, 0, block, bytes)};
    add_block(view, words, values + block * View::kParts * 32, total);
  }
  if (rest) {
    const __m512i bytes = _mm512_maskz_loadu_epi8((1ull << rest) - 1, codes);
    const decltype(words_of(view, p, row, 0, full, bytes)) words[] = {
        words_of(view, p, row, 0, full, bytes)};
    add_block(view, words, values + full * View::kParts * 32, total);
  }
  p.y[row] = _mm512_reduce_add_ps(total[0][0]) * p.x.unit[0] * unit;
}

// Rows row, row + 1, ... below `end`, of which the last fills up the places.
template <class View, int B>
void lane_rows(const View& view, const LaneProduct& p, int64_t row, int64_t end) {
  constexpr int R = kLaneRows, kRows = R * kLaneSets, kStep = B * View::kParts * 32;
  constexpr int64_t kAhead = 768;  // bytes of software prefetch
  const auto& [layer, x, table, m, y, scratch] = p;
  const int64_t row_bytes = layer.tile_cols() * layer.tile.bytes;
  const int64_t full = row_bytes / View::kBytes, rest = row_bytes % View::kBytes;
  const int64_t blocks = full + (rest != 0);
  int64_t at[kRows];
  const uint8_t* codes[kRows];
  float unit[kRows];
  alignas(64) __m512 total[kRows][B];
  for (int r = 0; r < kRows; ++r) {
    at[r] = row + r < end ? row + r : end - 1;
    codes[r] = layer.codes + at[r] * row_bytes;
    unit[r] = unit_of(view, p, at[r], r);
    for (int b = 0; b < B; ++b) total[r][b] = _mm512_setzero_ps();
  }
  const auto make = [&](int r, int64_t block) RS_LAMBDA {
    const __mmask64 mask = block < full ? kWholeBlock<View> : (1ull << rest) - 1;
    const __m512i bytes = _mm512_maskz_loadu_epi8(mask, codes[r] + block * View::kBytes);
    return words_of(view, p, at[r], r, block, bytes);
  };
  using Words = decltype(make(0, 0));
  // The words of the next set are made while the products of this one fill the schedulers.
  Words words[R], next[R];
  for (int r = 0; r < R; ++r) next[r] = make(r, 0);
  const int16_t* values = x.values.get();
  for (int64_t block = 0; block < blocks; ++block, values += kStep) {
    const int64_t later = block * View::kBytes + kAhead;
    const int64_t ahead = later < row_bytes ? later : later + (kRows - 1) * row_bytes;
#pragma GCC unroll 1
    for (int r = 0; r < kRows; r += R) {
      const bool last = r + R == kRows;
      const int64_t to = block + last < blocks ? block + last : 0;
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        words[i] = next[i];
        next[i] = make((last ? 0 : r + R) + i, to);
        _mm_prefetch(codes[r + i] + ahead, _MM_HINT_T0);
      }
      add_block(view, words, values, total + r);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int b = 0; b < B; ++b)
      if (b < m) y[b * layer.out + at[r]] = _mm512_reduce_add_ps(total[r][b]) * x.unit[b] * unit[r];
}

template <class View>
RS_INLINE View view_of(const LaneProduct& p) {
  if constexpr (View::kPrepared)
    return View(p.layer);
  else
    return View(p.table.at);
}

template <class View, int B>
void lane_product(const LaneProduct& p, int64_t row0, int64_t row1) {
  const View view = view_of<View>(p);
  if constexpr (B == 1)
    for (; row0 < row1; ++row0) lane_row(view, p, row0);
  else
    for (; row0 < row1; row0 += kLaneRows * kLaneSets) lane_rows<View, B>(view, p, row0, row1);
}

template <class View>
constexpr LaneKernel kLaneKernels[4] = {lane_product<View, 1>, lane_product<View, 2>,
                                        lane_product<View, 4>, lane_product<View, 8>};

// The lanes of `mask` to memory: all 32 bits of them, or the lower 16.
RS_INLINE void store_lanes(float* w, __m512i bits, __mmask16 mask) {
  _mm512_mask_storeu_epi32(w, mask, bits);
}
RS_INLINE void store_lanes(uint16_t* w, __m512i bits, __mmask16 mask) {
  _mm256_mask_storeu_epi16(w, mask, _mm512_cvtepi32_epi16(bits));
}

// For lanes_float.h: some lanes are those of a mask. NaNs that are rounded to bfloat16 must be
// quiet.
using Floats = __m512;
using Some = __mmask16;
constexpr bool kStoresBf16 = true;
RS_INLINE Floats load_some(const float* x, Some mask) { return _mm512_maskz_loadu_ps(mask, x); }
RS_INLINE void store_some(float* w, Floats x, Some mask) { _mm512_mask_storeu_ps(w, mask, x); }
RS_INLINE void store_some(uint16_t* w, Floats x, Some mask) {
  store_lanes(w, _mm512_srli_epi32(round_bf16(x), 16), mask);
}
RS_INLINE float sum_lanes(Floats x) { return _mm512_reduce_add_ps(x); }
RS_INLINE Floats add_product(Floats sum, Floats a, Floats b) { return _mm512_fmadd_ps(a, b, sum); }

RS_INLINE __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? 0xFFFF : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}
RS_INLINE __mmask64 first_bytes(int64_t count) {
  return count >= 64 ? ~0ull : count <= 0 ? 0 : (1ull << count) - 1;
}

}  // namespace
}  // namespace rs

#include "lanes_float.h"
