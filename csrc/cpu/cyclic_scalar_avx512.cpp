// Scalar cyclic codes on AVX-512: all levels in registers.
//
//   8 bits    64 codes at a time: the 256 levels are bytes in four registers, vpermi2b looks up
//             either half of the table and the top bit of the code chooses
//   16 bits   16 codes at a time: the cosine from a quarter of a turn in four registers
#include "cyclic_scalar_fast.h"

#if RS_FAST_X86
#include "avx512.h"

namespace rs {
namespace {

RS_INLINE void store(float* w, __m512 value) { _mm512_storeu_ps(w, value); }
RS_INLINE void store(uint16_t* w, __m512 value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(w),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(value), 16)));
}

// All levels, to be looked up 64 at a time.
struct Levels {
  __m512i at[4];

  RS_INLINE Levels() {
    for (int i = 0; i < 4; ++i) at[i] = load(kCyclicScalar[0][0] + 64 * i);
  }
  RS_INLINE __m512i operator()(__m512i codes) const {
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes),
                                  _mm512_permutex2var_epi8(at[0], codes, at[1]),
                                  _mm512_permutex2var_epi8(at[2], codes, at[3]));
  }
};

template <class T>
void decode8(const Layer& layer, int64_t row0, int64_t row1, T* w) {
  const Levels levels;
  const int64_t n = layer.tile_cols(), group = layer.tile.cols;
  const uint8_t* codes = layer.codes + row0 * n * group;
  for (int64_t t = row0 * n; t < row1 * n; ++t) {
    const __m512 step = _mm512_set1_ps(quiet(CyclicScalar<8>::step(layer.params[0][t])));
    for (int64_t j = 0; j < group; j += 64, codes += 64, w += 64) {
      const __m512i level = levels(load(codes));
      const __m128i part[4] = {_mm512_castsi512_si128(level), _mm512_extracti32x4_epi32(level, 1),
                               _mm512_extracti32x4_epi32(level, 2),
                               _mm512_extracti32x4_epi32(level, 3)};
      for (int i = 0; i < 4; ++i)
        store(w + 16 * i, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(part[i])), step));
    }
  }
}

template <class T>
void decode16(const Layer& layer, int64_t row0, int64_t row1, T* w) {
  const float* cosine = cyclic_cosines();
  const __m512 t0 = _mm512_loadu_ps(cosine), t1 = _mm512_loadu_ps(cosine + 16),
               t2 = _mm512_loadu_ps(cosine + 32), t3 = _mm512_loadu_ps(cosine + 48);
  const __m512i turn = _mm512_set1_epi32(256), half = _mm512_set1_epi32(128),
                quarter = _mm512_set1_epi32(64), one = _mm512_set1_epi32(1);
  const __m512 unit = _mm512_set1_ps(1.0f / 64);
  const int64_t n = layer.tile_cols(), group = layer.tile.cols;
  const uint8_t* codes = layer.codes + row0 * n * 2 * group;
  for (int64_t t = row0 * n; t < row1 * n; ++t) {
    const __m512 scale = _mm512_set1_ps(quiet(layer.params[0][t]));
    for (int64_t j = 0; j < group; j += 16, codes += 32, w += 16) {
      const __m512i c =
          _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
      // (16 phase + micro + 64 diff) mod 256, folded to the first half and then to a quarter turn.
      const __m512i diff = _mm512_and_si512(_mm512_srli_epi32(c, 2), _mm512_set1_epi32(0xC0));
      __m512i k = _mm512_and_si512(_mm512_add_epi32(c, diff), _mm512_set1_epi32(255));
      k = _mm512_min_epu32(k, _mm512_sub_epi32(turn, k));
      const __mmask16 negative = _mm512_cmpgt_epi32_mask(k, quarter);
      k = _mm512_min_epu32(k, _mm512_sub_epi32(half, k));
      __m512 value = _mm512_mask_blend_ps(_mm512_test_epi32_mask(k, _mm512_set1_epi32(32)),
                                          _mm512_permutex2var_ps(t0, k, t1),
                                          _mm512_permutex2var_ps(t2, k, t3));
      value = _mm512_maskz_mov_ps(_mm512_cmplt_epi32_mask(k, quarter), value);
      value = _mm512_mask_xor_ps(value, negative, value, _mm512_set1_ps(-0.0f));
      const __m512 amp = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_srli_epi32(c, 10), one));
      store(w, _mm512_mul_ps(_mm512_mul_ps(value, _mm512_mul_ps(amp, unit)), scale));
    }
  }
}

// As on AVX2: weights of a step of 64 as two registers of int16, in the order of the activations;
// kUnit is what they are times the group's step, and kFlush how many steps' products may be added
// in 32 bits.
template <int Bits>
struct Step;

template <>
struct Step<8> {
  static constexpr float kUnit = 1.0f;
  static constexpr int64_t kFlush = 64;
  Levels levels;
  RS_INLINE Step() {}  // an implicit one is not compiled for these instructions
  RS_INLINE void weights(const uint8_t* codes, __m512i* w) const {
    const __m512i level = levels(load(codes));
    w[0] = _mm512_srai_epi16(_mm512_slli_epi16(level, 8), 8);
    w[1] = _mm512_srai_epi16(level, 8);
  }
};

template <>
struct Step<16> {
  static constexpr float kUnit = 1.0f / 8192;
  static constexpr int64_t kFlush = 2;
  RS_INLINE static __m512i word(int x) { return _mm512_set1_epi16(static_cast<int16_t>(x)); }
  RS_INLINE static __m512i weight(__m512i c) {
    const __m512i shifted = _mm512_srli_epi16(c, 2);
    const __m512i k = _mm512_add_epi16(c, _mm512_and_si512(shifted, word(0xC0)));
    const __m512i u = _mm512_sub_epi16(word(1 << 14), _mm512_abs_epi16(_mm512_slli_epi16(k, 8)));
    const __m512i u15 = _mm512_adds_epi16(u, u), square = _mm512_mulhrs_epi16(u, u15);
    const __m512i square15 = _mm512_adds_epi16(square, square);
    const __m512i high = _mm512_sub_epi16(_mm512_mulhrs_epi16(square, word(2360)), word(10525));
    const __m512i sum = _mm512_add_epi16(_mm512_mulhrs_epi16(high, square15), word(25730));
    const __m512i amp = _mm512_add_epi16(_mm512_and_si512(shifted, word(0x3F00)), word(0x100));
    return _mm512_mulhrs_epi16(_mm512_mulhrs_epi16(u15, sum), amp);
  }
  RS_INLINE void weights(const uint8_t* codes, __m512i* w) const {
    for (int i = 0; i < 2; ++i) w[i] = weight(load(codes + 64 * i));
  }
};

// Whether strips of x meet several rows. 16-bit codes are too many: they would come too late.
template <int Bits, int B>
constexpr bool kStrips = B == kMaxBatch && Bits == 8;

// Adds the products of tiles [t, t + tiles) to total[B].
template <int Bits, int B>
RS_INLINE void add_tiles(const Step<Bits>& step, const Layer& layer, int64_t t, int64_t tiles,
                         const int16_t* values, __m512* total) {
  constexpr int kBytes = 8 * Bits, kAhead = 8192;  // bytes of a step and of software prefetch
  const int64_t steps = layer.tile.cols / 64;
  const uint8_t* codes = layer.codes + t * layer.tile.bytes;
  for (; tiles > 0; --tiles, ++t) {
    const __m512 scale =
        _mm512_set1_ps(CyclicScalar<Bits>::step(layer.params[0][t]) * Step<Bits>::kUnit);
    for (int64_t done = 0; done < steps; done += Step<Bits>::kFlush) {
      __m512i acc[B];
      for (__m512i& sum : acc) sum = _mm512_setzero_si512();
      for (int64_t i = std::min(steps - done, Step<Bits>::kFlush); i > 0; --i) {
        if (!kStrips<Bits, B>) _mm_prefetch(codes + kAhead, _MM_HINT_T0);
        if (Bits == 16) _mm_prefetch(codes + kAhead + 64, _MM_HINT_T0);
        __m512i w[2];
        step.weights(codes, w);
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b)
          for (int h = 0; h < 2; ++h)
            acc[b] = _mm512_dpwssd_epi32(acc[b], w[h], load(values + b * 64 + h * 32));
        codes += kBytes;
        values += 64 * B;
      }
      for (int b = 0; b < B; ++b)
        total[b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[b]), scale, total[b]);
    }
  }
}

template <int Bits, int B>
void product(const Layer& layer, const StepActivations& x, int64_t m, float* y, int64_t row0,
             int64_t row1) {
  constexpr int kRows = kStrips<Bits, B> ? kStripRows : 1;
  const int64_t n = layer.tile_cols(), strip = kStrips<Bits, B> ? strip_tiles(layer) : n;
  const Step<Bits> step;
  for (int64_t row = row0; row < row1; row += kRows) {
    __m512 total[kRows][B];
    for (auto& sums : total)
      for (__m512& sum : sums) sum = _mm512_setzero_ps();
    for (int64_t t = 0; t < n; t += strip)
      for (int r = 0; r < kRows && row + r < row1; ++r) {
        const int64_t first = (row + r) * n + t, tiles = std::min(strip, n - t);
        if (kStrips<Bits, B>) prefetch_tiles(layer, first + strip, first + 2 * strip);
        __m512 sums[B];
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) sums[b] = total[r][b];
        add_tiles<Bits, B>(step, layer, first, tiles, x.values.get() + t * layer.tile.cols * B,
                           sums);
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) total[r][b] = sums[b];
      }
    for (int r = 0; r < kRows && row + r < row1; ++r)
      for (int b = 0; b < B && b < m; ++b)
        y[b * layer.out + row + r] = _mm512_reduce_add_ps(total[r][b]) * x.unit[b];
  }
}

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {
namespace {

template <int Bits>
void linear(const Layer& layer, const float* x, int64_t m, float* y) {
  constexpr StepKernel kernels[4] = {product<Bits, 1>, product<Bits, 2>, product<Bits, 4>,
                                     product<Bits, 8>};
  step_linear(layer, x, m, y, 64, Bits == 8, kernels);
}

}  // namespace

void cyclic_scalar_avx512_slots(Row& row, int bits, int64_t group) {
  if (bits == 8 && group % 64 == 0) {
    row.decode = decode8<float>;
    row.decode_bf16 = decode8<uint16_t>;
  }
  if (bits == 16 && group % 16 == 0) {
    row.decode = decode16<float>;
    row.decode_bf16 = decode16<uint16_t>;
  }
  if (group % 64 == 0)
    bits == 8 ? fill_step_linear<8>(row, linear<8>) : fill_step_linear<16>(row, linear<16>);
}

}  // namespace rs
#endif
