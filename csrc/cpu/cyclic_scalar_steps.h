// Products of scalar cyclic codes by steps of as many columns as a register has bytes. Included
// behind lanes_avx2.h or lanes_avx512.h, so internal to its file, which brings
//   Ints, load_ints           a register of integers
//   add_pairs(sum, a, b)      sum plus products of pairs of int16, in 32 bits
//   to_floats                 of 32-bit lanes
//   add_saturated, round_product, magnitude       of int16
//   Levels()(codes)           int8 levels of codes of 8 bits
//   kAhead                    bytes of software prefetch
//   kStrips<Bits, B>          whether strips of x meet several rows
#pragma once

namespace rs {
namespace {

constexpr int64_t kStepColumns = sizeof(Ints);
typedef uint16_t Words __attribute__((vector_size(sizeof(Ints))));

// Weights of a step as two registers of int16, in the order of the activations; kUnit is what they
// are times the group's step, and kFlush how many steps' products may be added in 32 bits.
template <int Bits>
struct Step;

template <>
struct Step<8> {
  static constexpr float kUnit = 1.0f;
  static constexpr int64_t kFlush = 64;
  Levels levels;
  RS_INLINE Step() {}  // an implicit one is not compiled for these instructions
  RS_INLINE void weights(const uint8_t* codes, Ints* w) const {
    typedef int16_t Signed __attribute__((vector_size(sizeof(Ints))));
    const Ints level = levels(load_ints(codes));
    w[0] = (Ints)((Signed)((Words)level << 8) >> 8);
    w[1] = (Ints)((Signed)level >> 8);
  }
};

template <>
struct Step<16> {
  static constexpr float kUnit = 1.0f / 8192;
  static constexpr int64_t kFlush = 2;
  RS_INLINE Step() {}

  RS_INLINE static Words times(Words a, Words b) { return (Words)round_product((Ints)a, (Ints)b); }
  RS_INLINE static Words twice(Words a) { return (Words)add_saturated((Ints)a, (Ints)a); }

  // cos(2 pi k / 256) = sin(pi u / 2), u = 1 - |k| / 64 for k from -128 to 127, as u times a
  // polynomial in u^2, 1.7e-4 off at most and never above one: products of two steps just fit 32
  // bits. Fractions of 14 bits but where one of 15 says so.
  RS_INLINE static Ints weight(Ints codes) {
    const Words c = (Words)codes, shifted = c >> 2, k = c + (shifted & 0xC0);
    const Words u = (1 << 14) - (Words)magnitude((Ints)(k << 8)), u15 = twice(u);
    const Words square = times(u, u15);
    const Words high = times(square, Words{} + 2360) - 10525;
    const Words sum = times(high, twice(square)) + 25730;
    return (Ints)times(times(u15, sum), (shifted & 0x3F00) + 0x100);
  }
  RS_INLINE void weights(const uint8_t* codes, Ints* w) const {
    for (int i = 0; i < 2; ++i) w[i] = weight(load_ints(codes + i * kStepColumns));
  }
};

// Adds the products of tiles [t, t + tiles) to total[B].
template <int Bits, int B>
RS_INLINE void add_tiles(const Step<Bits>& step, const Layer& layer, int64_t t, int64_t tiles,
                         const int16_t* values, Floats* total) {
  const int64_t steps = layer.tile.cols / kStepColumns;
  const uint8_t* codes = layer.codes + t * layer.tile.bytes;
  for (; tiles > 0; --tiles, ++t) {
    const Floats scale =
        Floats{} + CyclicScalar<Bits>::step(layer.params[0][t]) * Step<Bits>::kUnit;
    for (int64_t done = 0; done < steps; done += Step<Bits>::kFlush) {
      Ints acc[B];
      for (Ints& sum : acc) sum = Ints{};
      for (int64_t i = std::min(steps - done, Step<Bits>::kFlush); i > 0; --i) {
        if (!kStrips<Bits, B>) _mm_prefetch(codes + kAhead, _MM_HINT_T0);
        if (Bits == 16) _mm_prefetch(codes + kAhead + 64, _MM_HINT_T0);
        Ints w[2];
        step.weights(codes, w);
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b)
          for (int h = 0; h < 2; ++h)
            acc[b] = add_pairs(acc[b], w[h], load_ints(values + (2 * b + h) * kStepColumns / 2));
        codes += kStepColumns * Bits / 8;
        values += kStepColumns * B;
      }
      for (int b = 0; b < B; ++b) total[b] = add_product(total[b], to_floats(acc[b]), scale);
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
    Floats total[kRows][B];
    for (auto& sums : total)
      for (Floats& sum : sums) sum = Floats{};
    for (int64_t t = 0; t < n; t += strip)
      for (int r = 0; r < kRows && row + r < row1; ++r) {
        const int64_t first = (row + r) * n + t, tiles = std::min(strip, n - t);
        if (kStrips<Bits, B>) prefetch_tiles(layer, first + strip, first + 2 * strip);
        Floats sums[B];
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) sums[b] = total[r][b];
        add_tiles<Bits, B>(step, layer, first, tiles, x.values.get() + t * layer.tile.cols * B,
                           sums);
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) total[r][b] = sums[b];
      }
    for (int r = 0; r < kRows && row + r < row1; ++r)
      for (int b = 0; b < B && b < m; ++b)
        y[b * layer.out + row + r] = sum_lanes(total[r][b]) * x.unit[b];
  }
}

// For the slot, which is not compiled for these instructions.
template <int Bits>
constexpr StepKernel kStepKernels[4] = {product<Bits, 1>, product<Bits, 2>, product<Bits, 4>,
                                        product<Bits, 8>};

}  // namespace
}  // namespace rs
