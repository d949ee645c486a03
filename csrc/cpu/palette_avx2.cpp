// Palettes on AVX2, in float32: 32 bits of codes in every lane, each shifted to its own code, which
// vpermps looks up among eight entries (twice for sixteen). Pairs are loaded from their codebook.
#include "fast.h"

#if RS_FAST_X86
#include <cstring>

#include "../codecs/palette.h"
#include "lanes.h"

namespace rs {
namespace {

// Sixteen words of five codes, 80 weights: of lane l of vector v its 32-bit word and place in it.
struct WordPlaces {
  uint32_t word[10][8]{}, shift[10][8]{};
  constexpr WordPlaces() {
    for (int j = 0; j < 80; ++j) {
      word[j / 8][j % 8] = static_cast<uint32_t>(j / 10);
      shift[j / 8][j % 8] = static_cast<uint32_t>(j / 5 % 2 * 16 + j % 5 * 3);
    }
  }
};
constexpr WordPlaces kWordPlaces;

}  // namespace
}  // namespace rs

#include "lanes_avx2.h"

namespace rs {
namespace {

template <int Bits>
struct DenseCodes {
  static constexpr int kEntries = 1 << Bits;

  // Of the n codes and what follows them `size` bytes may be read.
  template <class Visit>
  RS_INLINE static void each(const uint8_t* codes, int64_t size, int64_t n, const float* book,
                             Visit visit) {
    const FloatTable<kEntries> table(book);
    const __m256i shift =
        _mm256_setr_epi32(0, Bits, 2 * Bits, 3 * Bits, 4 * Bits, 5 * Bits, 6 * Bits, 7 * Bits);
    const auto eight = [&](const uint8_t* from) RS_LAMBDA {
      const auto word = static_cast<int>(load_word(from));
      return table(_mm256_srlv_epi32(_mm256_set1_epi32(word), shift));
    };
    int64_t j = 0;
    // Four bytes are read for eight codes.
    for (; j + 32 <= n && size >= 3 * Bits + 4; j += 32, codes += 4 * Bits, size -= 4 * Bits) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) visit(i, j + 8 * i, eight(codes + i * Bits), 8);
    }
    for (; j < n; j += 8, codes += Bits, size -= Bits) {
      uint8_t last[4] = {};
      for (int64_t i = 0; size < 4 && i < size; ++i) last[i] = codes[i];
      visit(0, j, eight(size < 4 ? last : codes), std::min<int64_t>(n - j, 8));
    }
  }
};

struct WordCodes {
  static constexpr int kEntries = 8;

  template <class Visit>
  RS_INLINE static void each(const uint8_t* codes, int64_t size, int64_t n, const float* book,
                             Visit visit) {
    const FloatTable<kEntries> table(book);
    const auto eight = [&](__m256i words, int i) RS_LAMBDA {
      const __m256i word = _mm256_permutevar8x32_epi32(words, load_words(kWordPlaces.word[i]));
      return table(_mm256_srlv_epi32(word, load_words(kWordPlaces.shift[i])));
    };
    int64_t j = 0;
    for (; j + 80 <= n; j += 80, codes += 32, size -= 32) {
      const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
#pragma GCC unroll 10
      for (int i = 0; i < 10; ++i) visit(i, j + 8 * i, eight(words, i), 8);
    }
    if (j == n) return;
    uint8_t last[32] = {};
    if (size < 32) std::memcpy(last, codes, static_cast<size_t>(size));
    const __m256i words =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(size < 32 ? last : codes));
    for (int i = 0; j < n; ++i, j += 8) visit(0, j, eight(words, i), std::min<int64_t>(n - j, 8));
  }
};

// Tiles are one run of codes when they have one codebook.
template <class Codes, bool Grouped>
struct PaletteRows {
  static constexpr bool kGrouped = Grouped;
  const Layer& layer;
  RS_INLINE explicit PaletteRows(const Layer& layer) : layer(layer) {}

  template <class Visit>
  RS_INLINE void each(int64_t row, int64_t tile0, int64_t tile1, Visit visit) const {
    const auto [rows, cols, bytes] = layer.tile;
    const int64_t n = layer.tile_cols(), run = Grouped ? 1 : tile1 - tile0;
    for (int64_t t = tile0; t < tile1; t += run) {
      const int64_t at = row * n + t;
      const float* book = layer.params[0] + (Grouped ? at * Codes::kEntries : 0);
      Codes::each(layer.codes + at * bytes, (layer.out * n - at) * bytes, run * cols, book,
                  [&, first = t * cols](int i, int64_t j, __m256 w, int64_t count)
                      RS_LAMBDA { visit(i, first + j, w, count); });
    }
  }
};

// Sums of values by code: each lane sums for itself, in float32 for a row.
template <class Codes>
void sum_by_code(const Layer& layer, int64_t row0, int64_t row1, const float* dw, double* total) {
  constexpr int kEntries = Codes::kEntries;
  alignas(32) float numbers[kEntries];  // a codebook that says which entry it is
  for (int e = 0; e < kEntries; ++e) numbers[e] = static_cast<float>(e);
  Layer numbered = layer;
  numbered.params[0] = numbers;
  const PaletteRows<Codes, false> rows(numbered);
  for (int64_t row = row0; row < row1; ++row, dw += layer.in) {
    __m256 sum[kEntries];
    for (__m256& lanes : sum) lanes = _mm256_setzero_ps();
    rows.each(row, 0, layer.tile_cols(),
              [&](int, int64_t j, __m256 number, int64_t count) RS_LAMBDA {
                const __m256 value = load_some(dw + j, count);
#pragma GCC unroll 16
                for (int e = 0; e < kEntries; ++e) {
                  const __m256 is =
                      _mm256_cmp_ps(number, _mm256_set1_ps(static_cast<float>(e)), _CMP_EQ_OQ);
                  sum[e] = _mm256_add_ps(sum[e], _mm256_and_ps(is, value));
                }
              });
    for (int e = 0; e < kEntries; ++e) total[e] += sum_lanes(sum[e]);
  }
}

// Pairs of weights, two at a time: the codebook's pairs by two codes.
struct PairRows {
  static constexpr bool kGrouped = false;
  const Layer& layer;
  VectorTable<32 * 32, 4> pairs;

  explicit PairRows(const Layer& layer) : layer(layer) {
    const float* book = layer.params[0];
    for (int second = 0; second < 32; ++second)
      for (int first = 0; first < 32; ++first) {
        float* to = pairs.at[32 * second + first];
        std::memcpy(to, book + 2 * first, 8);
        std::memcpy(to + 2, book + 2 * second, 8);
      }
  }
  template <class Visit>
  RS_INLINE void each(int64_t row, int64_t tile0, int64_t tile1, Visit visit) const {
    ten_bit_vectors(layer, row, tile0, tile1, pairs, visit);
  }
};

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {
namespace {

template <class Codes>
void adjoint(const Layer& layer, int64_t row0, int64_t row1, const float* dw, float* const* grads) {
  if (!grads[0]) return;
  double total[Codes::kEntries] = {};
  sum_by_code<Codes>(layer, row0, row1, dw, total);
  for (int e = 0; e < Codes::kEntries; ++e) grads[0][e] += static_cast<float>(total[e]);
}

template <class Codes>
void choose(Row& row, bool grouped) {
  if (grouped) return fill_float_slots<PaletteRows<Codes, true>>(row);
  fill_float_slots<PaletteRows<Codes, false>>(row);
  row.adjoint = adjoint<Codes>;
}

}  // namespace

void palette_avx2_slots(Row& row, PaletteLayout layout, int bits, bool grouped) {
  if (layout == PaletteLayout::pair) {
    fill_float_slots<PairRows>(row);
    return;
  }
  if (layout == PaletteLayout::words) return choose<WordCodes>(row, grouped);
  switch (bits) {
    case 1:
      return choose<DenseCodes<1>>(row, grouped);
    case 2:
      return choose<DenseCodes<2>>(row, grouped);
    case 3:
      return choose<DenseCodes<3>>(row, grouped);
    case 4:
      return choose<DenseCodes<4>>(row, grouped);
  }
}

}  // namespace rs
#endif
