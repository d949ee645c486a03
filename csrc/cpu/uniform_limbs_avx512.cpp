// Uniform codes times two or more rows of x on AVX-512 (BW, VBMI, VNNI), groups of a multiple of
// 32: see uniform_limbs.h for the layout.
//
// unpack   64 codes of any width to bytes by vpermb and vpmultishiftqb, some rows and columns at a
//          time: they stay in the first cache, at a distance that is no power of two.
// narrow   up to 8 rows of x: the bytes of a group stay in registers while rows of codes, each
//          broadcast from memory, pass by.
// wide     16 to 64 rows of x: a block of codes' rows by registers of x, first with the high bytes
//          of x, then, shifted by 8 bits, with the low ones.
#include "fast.h"

#if RS_FAST_X86
#include <vector>

#include "parallel.h"
#include "uniform_integers.h"
#include "uniform_limbs.h"

#include "avx512.h"

namespace rs {
namespace {

constexpr int kColumns = 512;               // that are unpacked at a time
constexpr int kStride = kColumns + 64;      // of unpacked rows
constexpr int kMostPieces = kColumns / 32;  // of those columns
constexpr int kNarrowBlock = 8;             // rows of codes at a time
constexpr int kWidePanel = 24;              // a multiple of every kWideBlock
template <int V>
constexpr int kWideBlock = 24 / V;  // rows of codes by V registers of x: 24 sums

// `count` codes, a multiple of 32, to bytes; fetches what lies `ahead` bytes behind them.
using Unpack = void (*)(const uint8_t* codes, int64_t count, int64_t ahead, uint8_t* to);

template <int Bits>
void unpack(const uint8_t* codes, int64_t count, int64_t ahead, uint8_t* to) {
  const __m512i top = _mm512_set1_epi8(static_cast<char>((1 << Bits) - 1));
  const auto spread = [&](__m512i c) __attribute__((always_inline)) {
    if constexpr (Bits == 8) return c;
    c = _mm512_permutexvar_epi8(load(kSpread<Bits>.bytes.at), c);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(load(kSpread<Bits>.cut.at), c), top);
  };
  for (int64_t line = 0; line < count * Bits / 8; line += 64)
    _mm_prefetch(codes + ahead + line, _MM_HINT_T0);
  for (; count >= 64; count -= 64, codes += 8 * Bits, to += 64) {
    constexpr __mmask64 kWhole = Bits == 8 ? ~0ull : (1ull << (8 * Bits % 64)) - 1;
    _mm512_store_si512(to, spread(_mm512_maskz_loadu_epi8(kWhole, codes)));
  }
  if (count) _mm512_store_si512(to, spread(_mm512_maskz_loadu_epi8((1ull << 4 * Bits) - 1, codes)));
}
constexpr Unpack kUnpack[] = {unpack<2>, unpack<3>, unpack<4>, unpack<5>,
                              unpack<6>, unpack<7>, unpack<8>};

RS_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct Product {
  const Layer& layer;
  Unpack unpack;
  const float* zero;  // of group g of row r at (r * groups + g) * zero_step
  int64_t zero_step;
  int bits;
  int64_t m;
  float* y;

  RS_INLINE int64_t bytes(int64_t columns) const { return columns * bits / 8; }
  // Fetches the scales and zero points of `count` rows.
  RS_INLINE void fetch_levels(int64_t row, int64_t count) const {
    const int64_t n = layer.tile_cols();
    for (int64_t i = row * n; i < (row + count) * n; i += 16) {
      _mm_prefetch(layer.params[0] + i, _MM_HINT_T0);
      if (zero_step) _mm_prefetch(zero + i, _MM_HINT_T0);
    }
  }
  // Which group each piece of the columns [c, c + columns) is of.
  RS_INLINE int64_t groups_of(int64_t c, int64_t columns, int64_t piece, int64_t* groups) const {
    int64_t n = 0;
    for (int64_t i = 0; i < columns; i += piece) groups[n++] = (c + i) / layer.tile.cols;
    return n;
  }
  // Scales and zero points of n groups of a row.
  RS_INLINE void levels(int64_t row, const int64_t* groups, int64_t n, float* scales,
                        float* zeros) const {
    const float* scale = layer.params[0] + row * layer.tile_cols();
    const float* own = zero + row * layer.tile_cols() * zero_step;
    for (int64_t i = 0; i < n; ++i) {
      scales[i] = scale[groups[i]];
      zeros[i] = own[groups[i] * zero_step];
    }
  }
};

// acc + the products of four unsigned with four signed bytes. Of the intrinsic gcc 12 copies acc,
// and keeps half of a block's sums in memory.
RS_INLINE void add_products(__m512i& acc, __m512i codes, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(x));
}

// total + scale * (acc - zero * sums)
RS_INLINE __m512 scaled(__m512i acc, __m512 sums, float scale, float zero, __m512 total) {
  const __m512 level = _mm512_fnmadd_ps(_mm512_set1_ps(zero), sums, _mm512_cvtepi32_ps(acc));
  return _mm512_fmadd_ps(_mm512_set1_ps(scale), level, total);
}

// Rows [first, end) of x into their lanes, by way of limbs[2 * in].
void quantize(const float* x, int64_t in, int64_t first, int64_t end, int8_t* limbs,
              const LimbActivations& to) {
  for (int64_t b = first; b < end; ++b) {
    const Quantum quantum(x + b * in, in, kLimbTop);
    to.unit[b] = quantum.unit;
    const __m512 inverse = _mm512_set1_ps(quantum.inverse);
    for (int64_t i = 0; i < in; i += 16) {
      const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + b * in + i), inverse));
      const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
      int8_t* at = limbs + i;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_cvtepi32_epi8(high));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(at + in), _mm512_cvtepi32_epi8(q));
    }
    const int64_t step_bytes = to.vectors * 64, lane = b * to.span;
    for (int64_t piece = 0; piece < in / to.piece; ++piece)
      for (int64_t limb = 0; limb < 2; ++limb) {
        const int8_t* from = limbs + limb * in + piece * to.piece;
        int8_t* row = to.values.get() + (piece * 2 + limb) * to.steps * step_bytes + lane * 4;
        for (int64_t step = 0; step < to.steps; ++step, row += step_bytes)
          for (int64_t i = 0; i < to.span; ++i, from += 4) __builtin_memcpy(row + i * 4, from, 4);
      }
  }
}

void sum_lanes(const LimbActivations& x, int64_t pieces) {
  const __m512i ones = _mm512_set1_epi8(1);
  const int64_t step_bytes = x.vectors * 64;
  for (int64_t piece = 0; piece < pieces; ++piece)
    for (int64_t v = 0; v < x.vectors; ++v) {
      __m512i sum = _mm512_setzero_si512();
      const int8_t* at = x.values.get() + piece * 2 * x.steps * step_bytes + v * 64;
      for (int limb = 0; limb < 2; ++limb) {
        sum = _mm512_slli_epi32(sum, 8);
        for (int64_t step = 0; step < x.steps; ++step, at += step_bytes)
          sum = _mm512_dpbusd_epi32(sum, ones, load(at));
      }
      _mm512_store_ps(x.sums.get() + (piece * x.vectors + v) * 16, _mm512_cvtepi32_ps(sum));
    }
}

// The next 64 / B bytes of codes for each of B rows of x.
template <int B>
RS_INLINE __m512i broadcast(const uint8_t* codes) {
  if constexpr (B == 2)
    return _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(codes)));
  if constexpr (B == 4)
    return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(codes)));
  if constexpr (B == 8) {
    long long bytes;
    __builtin_memcpy(&bytes, codes, sizeof bytes);
    return _mm512_set1_epi64(bytes);
  }
  int bytes;
  __builtin_memcpy(&bytes, codes, sizeof bytes);
  return _mm512_set1_epi32(bytes);
}

// Columns is x.piece.
template <int B, int Columns>
void narrow(const Product& p, const LimbActivations& x, int64_t row0, int64_t row1) {
  constexpr int R = kNarrowBlock, kSteps = Columns * B / 64;
  const int64_t in = p.layer.in, row_bytes = p.bytes(in);
  alignas(64) uint8_t panel[R * kStride];
  alignas(64) float totals[R * 16];
  float scales[R][kMostPieces], zeros[R][kMostPieces];
  int64_t groups[kMostPieces];
  const __m256i rows_of_totals = _mm256_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112);
  for (int64_t row = row0; row < row1; row += R) {
    const int64_t count = least(R, row1 - row);
    p.fetch_levels(row + R, R);
    __m512 total[R];
    for (int r = 0; r < R; ++r) total[r] = _mm512_setzero_ps();
    for (int64_t c = 0; c < in; c += kColumns) {
      const int64_t columns = least(kColumns, in - c);
      const int64_t pieces = p.groups_of(c, columns, Columns, groups);
      for (int64_t r = 0; r < R; ++r) {
        const int64_t at = row + least(r, count - 1);
        p.unpack(p.layer.codes + at * row_bytes + p.bytes(c), columns, R * row_bytes,
                 panel + r * kStride);
        p.levels(at, groups, pieces, scales[r], zeros[r]);
      }
      for (int64_t i = 0; i < columns; i += Columns) {
        const int64_t piece = (c + i) / Columns, g = i / Columns;
        const int8_t* values = x.values.get() + piece * 2 * kSteps * 64;
        const __m512 sums = _mm512_load_ps(x.sums.get() + piece * 16);
        __m512i high[kSteps], low[kSteps];
        for (int s = 0; s < kSteps; ++s) {
          high[s] = load(values + s * 64);
          low[s] = load(values + (kSteps + s) * 64);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          __m512i upper = _mm512_setzero_si512(), lower = _mm512_setzero_si512();
#pragma GCC unroll 8
          for (int s = 0; s < kSteps; ++s) {
            const __m512i codes = broadcast<B>(panel + r * kStride + i + s * 64 / B);
            add_products(upper, codes, high[s]);
            add_products(lower, codes, low[s]);
          }
          const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(upper, 8), lower);
          total[r] = scaled(sum, sums, scales[r][g], zeros[r][g], total[r]);
        }
      }
    }
    for (int r = 0; r < R; ++r) _mm512_store_ps(totals + r * 16, total[r]);
    for (int64_t b = 0; b < p.m; ++b) {
      __m256 sum = _mm256_setzero_ps();
      for (int i = 0; i < 16 / B; ++i)
        sum = _mm256_add_ps(sum, _mm256_i32gather_ps(totals + b * 16 / B + i, rows_of_totals, 4));
      _mm256_mask_storeu_ps(p.y + b * p.layer.out + row, static_cast<__mmask8>((1 << count) - 1),
                            _mm256_mul_ps(sum, _mm256_set1_ps(x.unit[b])));
    }
  }
}

// Unpacked rows of codes, with the scales and zero points of their pieces.
struct Panel {
  alignas(64) uint8_t codes[kWidePanel][kStride];
  float scales[kWidePanel][kMostPieces], zeros[kWidePanel][kMostPieces];
};

// kWideBlock<V> rows of the panel from `row` on with one piece of x, its g-th, added to their
// totals, `lanes` apart.
template <int V>
RS_INLINE void wide_block(const Panel& panel, int64_t row, int64_t g, const LimbActivations& x,
                          int64_t piece, float* totals, int64_t lanes) {
  constexpr int R = kWideBlock<V>;
  const uint8_t* codes = panel.codes[row] + g * x.piece;
  const int8_t* values = x.values.get() + piece * x.steps * 2 * V * 64;
  __m512i acc[R][V];
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = _mm512_setzero_si512();
#pragma GCC unroll 1
  for (int limb = 0; limb < 2; ++limb) {
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) asm("vpslld $8, %0, %0" : "+v"(acc[r][v]));
    for (int64_t step = 0; step < x.steps; ++step, values += V * 64) {
      __m512i w[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) w[v] = load(values + v * 64);
#pragma GCC unroll 24
      for (int r = 0; r < R; ++r) {
        const __m512i c = broadcast<16>(codes + r * kStride + step * 4);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) add_products(acc[r][v], c, w[v]);
      }
    }
  }
  const float *scales = panel.scales[row] + g, *zeros = panel.zeros[row] + g;
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const __m512 sums = _mm512_load_ps(x.sums.get() + (piece * V + v) * 16);
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) {
      float* total = totals + r * lanes + v * 16;
      _mm512_store_ps(total, scaled(acc[r][v], sums, scales[r * kMostPieces],
                                    zeros[r * kMostPieces], _mm512_load_ps(total)));
    }
  }
}

// `count` rows and `columns` columns, from column c on, of a panel.
template <int V>
void wide_panel(const Panel& panel, int64_t count, int64_t c, int64_t columns,
                const LimbActivations& x, float* totals, int64_t lanes) {
  for (int64_t i = 0; i < columns; i += x.piece)
    for (int64_t r = 0; r < count; r += kWideBlock<V>)
      wide_block<V>(panel, r, i / x.piece, x, (c + i) / x.piece, totals + r * lanes, lanes);
}
constexpr decltype(&wide_panel<1>) kWide[] = {wide_panel<1>, wide_panel<2>, wide_panel<3>,
                                              wide_panel<4>};

// All rows of x with rows [row0, row1) of codes, panel by panel.
void wide(const Product& p, const LimbActivations* chunks, Panel& panel, float* totals,
          int64_t row0, int64_t row1) {
  const int64_t in = p.layer.in, row_bytes = p.bytes(in);
  const int64_t piece = chunks[0].piece, lanes = round_up(p.m, 16);
  const int64_t most = kColumns / piece * piece;
  int64_t groups[kMostPieces];
  const __m512i rows_of_totals =
      _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                         _mm512_set1_epi32(static_cast<int>(lanes)));
  for (int64_t row = row0; row < row1; row += kWidePanel) {
    const int64_t count = least(kWidePanel, row1 - row);
    p.fetch_levels(row + kWidePanel, kWidePanel);
    __builtin_memset(totals, 0, sizeof(float) * static_cast<size_t>(kWidePanel * lanes));
    for (int64_t c = 0; c < in; c += most) {
      const int64_t columns = least(most, in - c);
      const int64_t pieces = p.groups_of(c, columns, piece, groups);
      const uint8_t* codes = p.layer.codes + row * row_bytes + p.bytes(c);
      for (int64_t r = 0; r < count; ++r) {
        p.unpack(codes + r * row_bytes, columns, p.bytes(columns), panel.codes[r]);
        p.levels(row + r, groups, pieces, panel.scales[r], panel.zeros[r]);
      }
      for (int64_t i = 0; i * kWideRows < p.m; ++i)
        kWide[chunks[i].vectors - 1](panel, count, c, columns, chunks[i], totals + i * kWideRows,
                                     lanes);
    }
    for (int64_t b = 0; b < p.m; ++b) {
      const __m512 unit = _mm512_set1_ps(chunks[b / kWideRows].unit[b % kWideRows]);
      for (int64_t r = 0; r < count; r += 16) {
        const __mmask16 mask =
            static_cast<__mmask16>(count - r >= 16 ? 0xFFFF : (1 << (count - r)) - 1);
        const __m512 sums = _mm512_i32gather_ps(rows_of_totals, totals + r * lanes + b, 4);
        _mm512_mask_storeu_ps(p.y + b * p.layer.out + row + r, mask, _mm512_mul_ps(sums, unit));
      }
    }
  }
}

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {
namespace {

constexpr int64_t kMostRows = 512;  // of x at once: 4 MB of integers for 4096 columns

void narrow_linear(const Product& p, const float* x) {
  const int64_t in = p.layer.in, piece = narrow_piece(p.layer.tile.cols);
  const LimbActivations values(p.m, in, piece);
  quantize(x, in, 0, p.m, Lines<int8_t>(2 * in).get(), values);
  sum_lanes(values, in / piece);
  const bool whole = piece == 64;
  const auto run = values.rows == 2   ? (whole ? narrow<2, 64> : narrow<2, 32>)
                   : values.rows == 4 ? (whole ? narrow<4, 64> : narrow<4, 32>)
                                      : (whole ? narrow<8, 64> : narrow<8, 32>);
  parallel_for(p.layer.out, round_up(row_grain(p.layer.out, in), kNarrowBlock),
               [&](int64_t begin, int64_t end) { run(p, values, begin, end); });
}

void wide_linear(const Product& p, const float* x) {
  const int64_t in = p.layer.in, piece = wide_piece(p.layer.tile.cols);
  std::vector<LimbActivations> chunks;
  for (int64_t b = 0; b < p.m; b += kWideRows)
    chunks.emplace_back(std::max<int64_t>(std::min<int64_t>(kWideRows, p.m - b), kNarrowRows + 1),
                        in, piece);
  // Sixteen rows fill whole lines.
  parallel_for(p.m, 16, [&](int64_t begin, int64_t end) {
    const Lines<int8_t> limbs(2 * in);
    for (int64_t b = begin; b < end; b += 16) {
      const int64_t first = b / kWideRows * kWideRows;
      quantize(x + first * in, in, b - first, std::min(b + 16, end) - first, limbs.get(),
               chunks[static_cast<size_t>(b / kWideRows)]);
    }
  });
  for (const LimbActivations& chunk : chunks) sum_lanes(chunk, in / piece);
  parallel_for(p.layer.out, kWidePanel, [&](int64_t begin, int64_t end) {
    const Lines<Panel> panel(1);
    const Lines<float> totals(round_up(kWidePanel, 16) * round_up(p.m, 16));
    wide(p, chunks.data(), panel[0], totals.get(), begin, end);
  });
}

}  // namespace

void uniform_limbs_avx512(const Layer& layer, int bits, const float* x, int64_t m, float* y) {
  const bool symmetric = layer.params.size() == 1;
  const float middle = static_cast<float>(1 << (bits - 1));
  Product p{
      layer, kUnpack[bits - 2], symmetric ? &middle : layer.params[1], symmetric ? 0 : 1, bits, m,
      y};
  for (int64_t b = 0; b < m; b += kMostRows) {
    p.m = std::min(kMostRows, m - b);
    p.y = y + b * layer.out;
    (p.m > kNarrowRows ? wide_linear : narrow_linear)(p, x + b * layer.in);
  }
}

}  // namespace rs
#endif
