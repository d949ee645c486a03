#include "panels.h"

#include <algorithm>
#include <numeric>

#include "clones.h"
#include "fast.h"
#include "half.h"
#include "pairs.h"
#include "parallel.h"

#if RS_FAST_X86
namespace rs {
namespace {

// Weights decoded at a time: to be multiplied at once, 256 KB of bfloat16 in the second-level
// cache; 32 KB on the way there or to a panel.
constexpr int64_t kPiece = int64_t{1} << 17, kChunk = int64_t{1} << 14;
// For all threads, 4 or 8 MB in the third-level cache. Larger ones save passes over the gradient.
int64_t panel_weights(int64_t m) { return int64_t{1} << (m < 256 ? 21 : 22); }
constexpr int64_t kBatch = 512;  // rows of x a piece meets at a time

RS_CLONES void narrow(const float* x, int64_t n, uint16_t* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = to_bf16(x[i]);
}

// Rows [row0, row1) of T rounded to bfloat16, by way of float32 where the codec has no other.
void decode_narrow(const Row& row, const Layer& layer, int64_t row0, int64_t row1, uint16_t* w) {
  if (row.decode_bf16) return row.decode_bf16(layer, row0, row1, w);
  const int64_t step = rows_of(kChunk, row.tile.rows, layer);
  std::vector<float> wide(static_cast<size_t>(std::min(step, row1 - row0) * layer.in));
  for (int64_t r = row0; r < row1; r += step) {
    const int64_t end = std::min(r + step, row1);
    row.decode(layer, r, end, wide.data());
    narrow(wide.data(), (end - r) * layer.in, w + (r - row0) * layer.in);
  }
}

// Kept by the thread: fresh pages for every call cost as much as decoding into them.
uint32_t* kept_panel(int64_t n) {
  thread_local int64_t size = 0;
  thread_local Lines<uint32_t> pages(0);
  if (size < n) pages = Lines<uint32_t>(n), size = n;
  return pages.get();
}

// y[cols * out] = part[rows * apart]^T by squares whose lines fit the first-level cache.
void turn(const float* part, int64_t apart, int64_t rows, int64_t cols, float* y, int64_t out) {
  constexpr int64_t kSquare = 16;
  for (int64_t j0 = 0; j0 < cols; j0 += kSquare)
    for (int64_t i0 = 0; i0 < rows; i0 += kSquare) {
      const int64_t j1 = std::min(j0 + kSquare, cols), i1 = std::min(i0 + kSquare, rows);
      for (int64_t j = j0; j < j1; ++j)
        for (int64_t i = i0; i < i1; ++i) y[j * out + i] = part[i * apart + j];
    }
}

}  // namespace

void panel_linear(const Row& row, const Layer& layer, const uint16_t* x, int64_t m, float* y) {
  const int64_t in = layer.in, out = layer.out, pairs = in / 2;
  const int64_t rest = m % 16 <= kDotCols ? m % 16 : 0, whole = m - rest;
  const int64_t piece = rows_of(kPiece, std::lcm(row.tile.rows, kPairRows), layer);
  // Not a power of two, which would map the lines of a square to few places of the caches.
  const int64_t apart = std::min(kBatch, m) + 16;
  const Lines<uint32_t> right(round_up(whole, kPairCols) * pairs);
  pair_columns(x, whole, in, pairs, kPairCols, right.get());
  parallel_for(out, piece, [&](int64_t begin, int64_t end) {
    const Lines<uint32_t> w(std::min(piece, end - begin) * pairs);
    const Lines<float> part(piece * apart);
    for (int64_t r = begin; r < end; r += piece) {
      const int64_t rows = std::min(piece, end - r);
      decode_narrow(row, layer, r, r + rows, reinterpret_cast<uint16_t*>(w.get()));
      for (int64_t b = 0; b < m; b += kBatch) {
        const int64_t cols = std::min(kBatch, m - b), paired = std::min(cols, whole - b);
        if (paired)
          pair_product({w.get(), kPairRows * pairs, pairs, 1}, right.get() + b * pairs,
                       kPairCols * pairs, pairs, rows, paired, part.get(), apart, false);
        if (paired < cols)
          dot_product(reinterpret_cast<const uint16_t*>(w.get()), x + (b + paired) * in, in, rows,
                      cols - paired, part.get() + paired, apart);
        turn(part.get(), apart, rows, cols, y + b * out + r, out);
      }
    }
  });
}

void panel_grad_input(const Row& row, const Layer& layer, const uint16_t* dy, int64_t m,
                      int64_t width, float* dx) {
  const int64_t in = layer.in, out = layer.out, blocks = (in + kPairCols - 1) / kPairCols;
  const int64_t unit = std::lcm(row.tile.rows, int64_t{2}), chunk = rows_of(kChunk, unit, layer);
  const int64_t most = std::min(rows_of(panel_weights(m), chunk, layer), round_up(out, 2));
  uint32_t* panel = kept_panel(blocks * kPairCols * most / 2);
  const Lines<uint32_t> left(round_up(m, kPairRows) * most / 2);
  for (int64_t r0 = 0; r0 < out; r0 += most) {
    const int64_t rows = std::min(most, out - r0), pairs = (rows + 1) / 2,
                  apart = pairs * kPairCols;
    parallel_for(rows, chunk, [&](int64_t begin, int64_t end) {
      std::vector<uint16_t> w(static_cast<size_t>(chunk * in));
      for (int64_t r = begin; r < end; r += chunk) {
        const int64_t n = std::min(chunk, end - r);
        decode_narrow(row, layer, r0 + r, r0 + r + n, w.data());
        pair_rows(w.data(), n, in, in, kPairCols, panel + r / 2 * kPairCols, apart);
      }
    });
    pair_columns(dy + r0, m, width, pairs, kPairRows, left.get());
    parallel_for(in, kPairCols, [&](int64_t begin, int64_t end) {
      pair_product({left.get(), kPairRows * pairs, 1, kPairRows}, panel + begin * pairs, apart,
                   pairs, m, end - begin, dx + begin, in, r0 > 0);
    });
  }
}
}  // namespace rs
#endif
