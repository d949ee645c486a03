// Uniform codes times two to eight rows of x on AVX-512 (BW, VBMI, VNNI): see uniform_limbs.h for
// the layout.
//
// A piece of x stays in registers while rows of codes, broadcast from memory, pass by: codes of 8
// and 4 bits from where they are, of other widths unpacked to bytes. The next rows' codes are
// fetched to the second-level cache: x would push them out of the first. Zero points meet the sums
// of x once for each row, span groups at a time.
#include "fast.h"

#if RS_FAST_X86
#include "uniform_limbs.h"

#include "avx512.h"

namespace rs {
namespace {

constexpr int kColumns = 512;           // that are unpacked at a time
constexpr int kStride = kColumns + 64;  // of unpacked rows: no power of two
constexpr int kRows = 8;                // of codes at a time
constexpr int kNear = 192;              // bytes of codes from the second-level cache to the first
constexpr int kLevels = 64;             // groups whose zero points are taken at a time

RS_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// 64 / B bytes, for each of B rows of x.
template <int B>
RS_INLINE __m512i broadcast(const void* from) {
  if constexpr (B == 2)
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
  if constexpr (B == 4)
    return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(from)));
  long long bytes;
  __builtin_memcpy(&bytes, from, sizeof bytes);
  return _mm512_set1_epi64(bytes);
}

RS_INLINE __m512 add_neighbours(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD));
}

// Sums of the lanes of each row of x, for kRows rows of codes: to[b * kRows + r].
template <int B>
RS_INLINE void sum_lanes(const __m512* total, float* to) {
  alignas(64) float rows[kRows * B];
  __m512 two[4];
  for (int k = 0; k < 4; ++k) two[k] = add_neighbours(total[2 * k], total[2 * k + 1]);
  if constexpr (B == 8) {
    for (int k = 0; k < 4; ++k) _mm512_store_ps(rows + 16 * k, two[k]);
    for (int b = 0; b < B; ++b)
      for (int r = 0; r < kRows; ++r)
        to[b * kRows + r] = rows[r / 2 * 16 + b / 2 * 4 + r % 2 * 2 + b % 2];
    return;
  }
  const __m512 low = add_neighbours(two[0], two[1]), high = add_neighbours(two[2], two[3]);
  if constexpr (B == 4) {
    _mm512_store_ps(
        to,
        _mm512_permutex2var_ps(
            low, _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23), high));
    _mm512_store_ps(
        to + 16,
        _mm512_permutex2var_ps(
            low, _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31),
            high));
  } else {
    const __m512 sum =
        _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xDD));
    _mm512_store_ps(to, _mm512_shuffle_f32x4(sum, sum, 0xD8));
  }
}

// total[r] = - sum over groups of scale * zero * sum of x.
template <int B>
RS_INLINE void zero_points(const LimbProduct& p, const LimbActivations& x,
                           const float* const* scale, const float* const* zero, __m512* total) {
  constexpr int kSpan = 16 / B;
  alignas(64) float offset[kRows][kLevels];
  const int64_t groups = p.layer.tile_cols();
  const __m512 middle = _mm512_set1_ps(*p.zero);
  for (int r = 0; r < kRows; ++r) total[r] = _mm512_setzero_ps();
  for (int64_t first = 0; first < groups; first += kLevels) {
    const int64_t count = least(groups - first, kLevels);
    for (int r = 0; r < kRows; ++r)
      for (int64_t g = 0; g < count; g += 16) {
        const __mmask16 mask =
            static_cast<__mmask16>(count - g >= 16 ? 0xFFFF : (1 << (count - g)) - 1);
        const __m512 z = p.zero_step ? _mm512_maskz_loadu_ps(mask, zero[r] + first + g) : middle;
        _mm512_store_ps(offset[r] + g,
                        _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, scale[r] + first + g), z));
      }
    const float* sums = x.sums.get() + first * B;
    for (int64_t g = 0; g < count; g += kSpan, sums += 16) {
      const __m512 sum = _mm512_load_ps(sums);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
        total[r] =
            _mm512_fnmadd_ps(_mm512_castsi512_ps(broadcast<B>(offset[r] + g)), sum, total[r]);
    }
  }
}

// Where the bytes of codes come from.
enum class Source {
  bytes,    // the codes are bytes
  nibbles,  // two codes a byte: 64 / B bytes at a time, low halves before high ones
  panel,    // other widths are unpacked to bytes
};

// acc[row][limb] + the products of a piece of Rows rows of codes, in turns: a sum alone would wait
// for itself.
template <Source From, int Limbs, int B, int Steps, int Rows>
RS_INLINE void add_piece(const uint8_t* const* from, const __m512i (*x)[Steps],
                         __m512i (*acc)[Limbs]) {
  const auto add = [&](int r, __m512i codes, int s) __attribute__((always_inline)) {
    for (int l = 0; l < Limbs; ++l) add_products(acc[r][l], codes, x[l][s]);
  };
  constexpr int kStep = From == Source::nibbles ? 2 : 1;
  const __m512i low = _mm512_set1_epi8(15);
#pragma GCC unroll 8
  for (int s = 0; s < Steps; s += kStep)
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const __m512i codes = broadcast<B>(from[r] + s / kStep * 64 / B);
      if constexpr (From == Source::nibbles) {
        add(r, _mm512_and_si512(codes, low), s);
        add(r, _mm512_and_si512(_mm512_srli_epi16(codes, 4), low), s + 1);
      } else {
        add(r, codes, s);
      }
    }
}

// Columns is x.piece, Limbs x.limbs.
template <Source From, int Limbs, int B, int Columns>
void narrow(const LimbProduct& p, const LimbActivations& x, int64_t row0, int64_t row1) {
  constexpr int R = kRows, kSteps = Columns * B / 64;
  constexpr int kTogether = Limbs == 1 ? 4 : 2;
  constexpr int kBytes = From == Source::nibbles ? Columns / 2 : Columns;
  const int64_t in = p.layer.in, row_bytes = p.bytes(in), groups = p.layer.tile_cols();
  const int64_t pieces_of_group = p.layer.tile.cols / Columns;
  alignas(64) uint8_t panel[From == Source::panel ? R * kStride : 64];
  alignas(64) float sums[R * B];
  for (int64_t row = row0; row < row1; row += R) {
    const int64_t count = least(R, row1 - row);
    const float *scale[R], *zero[R];
    const uint8_t* codes[R];
    for (int64_t r = 0; r < R; ++r) {
      const int64_t at = row + least(r, count - 1);
      codes[r] = p.layer.codes + at * row_bytes;
      scale[r] = p.layer.params[0] + at * groups;
      zero[r] = p.zero + at * groups * p.zero_step;
    }
    for (int64_t i = row * groups; i < (row + R) * groups; i += 16) {
      _mm_prefetch(p.layer.params[0] + R * groups + i, _MM_HINT_T1);
      if (p.zero_step) _mm_prefetch(p.zero + R * groups + i, _MM_HINT_T1);
    }
    __m512 total[R];
    zero_points<B>(p, x, scale, zero, total);
    const int8_t* values = x.values.get();
    const float* unit = x.unit.get();
    int64_t g = 0, left = pieces_of_group;
    for (int64_t c = 0; c < in; c += kColumns) {
      const int64_t columns = least(kColumns, in - c);
      if constexpr (From == Source::panel) {
        for (int r = 0; r < R; ++r)
          p.unpack(codes[r] + p.bytes(c), columns, R * row_bytes, panel + r * kStride);
      }
      for (int64_t i = 0; i < columns; i += Columns) {
        __m512i limb[Limbs][kSteps];
        for (int l = 0; l < Limbs; ++l)
          for (int s = 0; s < kSteps; ++s) limb[l][s] = load(values + (l * kSteps + s) * 64);
#pragma GCC unroll 8
        for (int r0 = 0; r0 < R; r0 += kTogether) {
          const uint8_t* from[kTogether];
          __m512i acc[kTogether][Limbs];
#pragma GCC unroll 8
          for (int r = 0; r < kTogether; ++r) {
            from[r] = panel + (r0 + r) * kStride + i;
            if constexpr (From != Source::panel) {
              from[r] = codes[r0 + r];
              codes[r0 + r] += kBytes;
              _mm_prefetch(from[r] + R * row_bytes, _MM_HINT_T1);
              _mm_prefetch(from[r] + kNear, _MM_HINT_T0);
            }
            for (int l = 0; l < Limbs; ++l) acc[r][l] = _mm512_setzero_si512();
          }
          add_piece<From, Limbs, B, kSteps, kTogether>(from, limb, acc);
#pragma GCC unroll 8
          for (int r = 0; r < kTogether; ++r) {
            __m512 level;
            if constexpr (Limbs == 2)
              level =
                  _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(acc[r][0], 8), acc[r][1]));
            else
              level = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[r][0]), _mm512_load_ps(unit));
            total[r0 + r] = _mm512_fmadd_ps(_mm512_set1_ps(scale[r0 + r][g]), level, total[r0 + r]);
          }
        }
        values += Limbs * kSteps * 64;
        unit += 16;
        if (--left == 0) ++g, left = pieces_of_group;
      }
    }
    sum_lanes<B>(total, sums);
    for (int64_t b = 0; b < p.m; ++b) {
      const __m256 one = _mm256_set1_ps(Limbs == 2 ? x.unit[b] : 1.0f);
      _mm256_mask_storeu_ps(p.y + b * p.layer.out + row, static_cast<__mmask8>((1 << count) - 1),
                            _mm256_mul_ps(_mm256_load_ps(sums + b * R), one));
    }
  }
}

template <int Limbs, int B, int Columns>
void choose(const LimbProduct& p, const LimbActivations& x, int64_t row0, int64_t row1) {
  if (p.bits == 8) return narrow<Source::bytes, Limbs, B, Columns>(p, x, row0, row1);
  if constexpr (Columns * B >= 128)
    if (x.nibbles) return narrow<Source::nibbles, Limbs, B, Columns>(p, x, row0, row1);
  narrow<Source::panel, Limbs, B, Columns>(p, x, row0, row1);
}
template <int Limbs, int Columns>
constexpr decltype(&choose<Limbs, 2, Columns>) kNarrow[] = {
    choose<Limbs, 2, Columns>, choose<Limbs, 4, Columns>, choose<Limbs, 8, Columns>};

}  // namespace

void uniform_narrow_avx512(const LimbProduct& p, const LimbActivations& x, int64_t row0,
                           int64_t row1) {
  const auto* run = x.limbs == 2 ? (x.piece == 64 ? kNarrow<2, 64> : kNarrow<2, 32>)
                                 : (x.piece == 64 ? kNarrow<1, 64> : kNarrow<1, 32>);
  run[x.rows / 4](p, x, row0, row1);
}

}  // namespace rs

#pragma GCC pop_options
#endif
