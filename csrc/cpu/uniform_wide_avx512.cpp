// Uniform codes times nine or more rows of x on AVX-512 (BW, VBMI, VNNI): see uniform_limbs.h for
// the layout.
//
// A block of codes' rows meets one to four registers of x, first with the high bytes of x, then,
// shifted by 8 bits, with the low ones. A piece of 64 rows of x stays in the first cache while all
// blocks of a panel, unpacked to bytes in the second one, pass by.
#include "fast.h"

#if RS_FAST_X86
#include "uniform_limbs.h"

#include "avx512.h"

namespace rs {
namespace {

constexpr int kColumns = 512;               // that are unpacked at a time
constexpr int kStride = kColumns + 64;      // of unpacked rows: no power of two
constexpr int kMostPieces = kColumns / 32;  // of those columns
constexpr int kPanel = 96;                  // rows of codes, a multiple of every kBlock
template <int V>
constexpr int kBlock = 24 / V;  // rows of codes by V registers of x: 24 sums

RS_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Unpacked rows of codes, with the scales and zero points of their groups.
struct Panel {
  alignas(64) uint8_t codes[kPanel][kStride];
  alignas(64) float scales[kPanel][kMostPieces], zeros[kPanel][kMostPieces];
};

// kBlock<V> rows of the panel from `row` on with one piece of x, of the panel's i-th columns and
// g-th group, added to their totals, `lanes` apart.
template <int Limbs, int V>
RS_INLINE void add_block(const Panel& panel, int64_t row, int64_t i, int64_t g,
                         const LimbActivations& x, int64_t piece, float* totals, int64_t lanes) {
  constexpr int R = kBlock<V>;
  const uint8_t* codes = panel.codes[row] + i;
  const int8_t* values = x.values.get() + piece * x.steps * Limbs * V * 64;
  __m512i acc[R][V];
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = _mm512_setzero_si512();
#pragma GCC unroll 1
  for (int limb = 0; limb < Limbs; ++limb) {
    if (Limbs > 1) {
#pragma GCC unroll 24
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) asm("vpslld $8, %0, %0" : "+v"(acc[r][v]));
    }
    for (int64_t step = 0; step < x.steps; ++step, values += V * 64) {
      __m512i w[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) w[v] = load(values + v * 64);
#pragma GCC unroll 24
      for (int r = 0; r < R; ++r) {
        int four;
        __builtin_memcpy(&four, codes + r * kStride + step * 4, sizeof four);
        const __m512i c = _mm512_set1_epi32(four);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) add_products(acc[r][v], c, w[v]);
      }
    }
  }
  const float *scales = panel.scales[row] + g, *zeros = panel.zeros[row] + g;
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const __m512 sums = _mm512_load_ps(x.sums.get() + (piece * V + v) * 16);
    const __m512 unit = _mm512_load_ps(x.unit.get() + (Limbs == 1 ? piece * V + v : 0) * 16);
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) {
      __m512 level = _mm512_cvtepi32_ps(acc[r][v]);
      const __m512 zero = _mm512_set1_ps(zeros[r * kMostPieces]);
      if constexpr (Limbs == 1)
        level = _mm512_fmsub_ps(level, unit, _mm512_mul_ps(zero, sums));
      else
        level = _mm512_fnmadd_ps(zero, sums, level);
      float* total = totals + r * lanes + v * 16;
      _mm512_store_ps(total, _mm512_fmadd_ps(_mm512_set1_ps(scales[r * kMostPieces]), level,
                                             _mm512_load_ps(total)));
    }
  }
}

// `count` rows and `columns` columns, from column c on, of a panel.
template <int Limbs, int V>
void add_panel(const Panel& panel, int64_t count, int64_t c, int64_t columns, int64_t group,
               const LimbActivations& x, float* totals, int64_t lanes) {
  for (int64_t i = 0; i < columns; i += x.piece) {
    const int64_t g = (c + i) / group - c / group;
    for (int64_t r = 0; r < count; r += kBlock<V>)
      add_block<Limbs, V>(panel, r, i, g, x, (c + i) / x.piece, totals + r * lanes, lanes);
  }
}
template <int Limbs>
constexpr decltype(&add_panel<Limbs, 1>) kAdd[] = {add_panel<Limbs, 1>, add_panel<Limbs, 2>,
                                                   add_panel<Limbs, 3>, add_panel<Limbs, 4>};

// Copies up to 16 floats.
RS_INLINE void copy(const float* from, int64_t n, float* to) {
  const __mmask16 mask = static_cast<__mmask16>((1 << n) - 1);
  _mm512_store_ps(to, _mm512_maskz_loadu_ps(mask, from));
}

// All rows of x with rows [row0, row1) of codes, panel by panel.
void wide(const LimbProduct& p, const LimbActivations* chunks, Panel& panel, float* totals,
          int64_t row0, int64_t row1) {
  const int64_t in = p.layer.in, row_bytes = p.bytes(in), groups = p.layer.tile_cols();
  const int64_t group = p.layer.tile.cols, piece = chunks[0].piece, lanes = round_up(p.m, 16);
  const int64_t most = kColumns / piece * piece;
  const auto* add = chunks[0].limbs == 2 ? kAdd<2> : kAdd<1>;
  const __m512i rows_of_totals =
      _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                         _mm512_set1_epi32(static_cast<int>(lanes)));
  for (int64_t row = row0; row < row1; row += kPanel) {
    const int64_t count = least(kPanel, row1 - row);
    __builtin_memset(totals, 0, sizeof(float) * static_cast<size_t>(kPanel * lanes));
    for (int64_t c = 0; c < in; c += most) {
      const int64_t columns = least(most, in - c);
      const int64_t g = c / group, n = (c + columns - 1) / group - g + 1;
      for (int64_t r = 0; r < count; ++r) {
        const int64_t at = row + r;
        p.unpack(p.layer.codes + at * row_bytes + p.bytes(c), columns, p.bytes(columns),
                 panel.codes[r]);
        copy(p.layer.params[0] + at * groups + g, n, panel.scales[r]);
        if (p.zero_step)
          copy(p.zero + at * groups + g, n, panel.zeros[r]);
        else
          _mm512_store_ps(panel.zeros[r], _mm512_set1_ps(*p.zero));
      }
      for (int64_t i = 0; i * kWideRows < p.m; ++i)
        add[chunks[i].vectors - 1](panel, count, c, columns, group, chunks[i],
                                   totals + i * kWideRows, lanes);
    }
    for (int64_t b = 0; b < p.m; ++b) {
      const LimbActivations& x = chunks[b / kWideRows];
      const __m512 unit = _mm512_set1_ps(x.limbs == 2 ? x.unit[b % kWideRows] : 1.0f);
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

void uniform_wide_avx512(const LimbProduct& p, const LimbActivations* chunks, int64_t row0,
                         int64_t row1) {
  const Lines<Panel> panel(1);
  const Lines<float> totals(round_up(kPanel, 16) * round_up(p.m, 16));
  wide(p, chunks, panel[0], totals.get(), row0, row1);
}

}  // namespace rs

#pragma GCC pop_options
#endif
