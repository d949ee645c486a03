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

  template <class Visit>
  RS_INLINE static void each(const uint8_t* codes, int64_t size, int64_t n, const float* book,
                             Visit visit) {
    const FloatTable<kEntries> table(book);
    const __m256i shift =
        _mm256_setr_epi32(0, Bits, 2 * Bits, 3 * Bits, 4 * Bits, 5 * Bits, 6 * Bits, 7 * Bits);
    const auto eight = [&](const uint8_t* from, int64_t bytes) RS_LAMBDA {
      uint32_t word = 0;
      std::memcpy(&word, from, static_cast<size_t>(bytes));
      return table(_mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(word)), shift));
    };
    int64_t j = 0;
    // Four bytes are read for eight codes: all of them must be there.
    for (; j + 32 <= n && size >= 3 * Bits + 4; j += 32, codes += 4 * Bits, size -= 4 * Bits) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) visit(i, j + 8 * i, eight(codes + i * Bits, 4), 8);
    }
    for (; j < n; j += 8, codes += Bits, size -= Bits)
      visit(0, j, eight(codes, std::min<int64_t>(size, 4)), std::min<int64_t>(n - j, 8));
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
    std::memcpy(last, codes, static_cast<size_t>(size));
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(last));
    for (int i = 0; j < n; ++i, j += 8) visit(0, j, eight(words, i), std::min<int64_t>(n - j, 8));
  }
};

// Pairs of weights as they lie in the codebook, four at a time.
struct PairRows {
  template <class Visit>
  RS_INLINE static void each(const Layer& layer, int64_t row, Visit visit) {
    const float* book = layer.params[0];
    const uint8_t* codes = layer.codes + row * layer.tile_cols() * 5;
    const auto pair = [&](uint64_t bits, int k) RS_LAMBDA {
      return _mm_castpd_ps(_mm_loadl_pd(
          _mm_setzero_pd(), reinterpret_cast<const double*>(book + 2 * ((bits >> (5 * k)) & 31))));
    };
    const auto two = [&](uint64_t bits, int k)
                         RS_LAMBDA { return _mm_movelh_ps(pair(bits, k), pair(bits, k + 1)); };
    for (int64_t j = 0; j < layer.in; j += 16, codes += 5) {
      uint32_t low;
      std::memcpy(&low, codes, 4);
      const uint64_t bits = static_cast<uint64_t>(codes[4]) << 32 | low;
      visit(0, j, _mm256_set_m128(two(bits, 2), two(bits, 0)), 8);
      visit(1, j + 8, _mm256_set_m128(two(bits, 6), two(bits, 4)), 8);
    }
  }
};

// A row is one run of codes when all of it has one codebook.
template <class Codes, bool Grouped>
struct PaletteRows {
  template <class Visit>
  RS_INLINE static void each(const Layer& layer, int64_t row, Visit visit) {
    const int64_t runs = Grouped ? layer.tile_cols() : 1, cols = layer.in / runs;
    const int64_t size = layer.tile_cols() / runs * layer.tile.bytes;
    for (int64_t run = 0; run < runs; ++run)
      Codes::each(layer.codes + (row * runs + run) * size, size, cols,
                  layer.params[0] + (Grouped ? (row * runs + run) * Codes::kEntries : 0),
                  [&](int i, int64_t j, __m256 w, int64_t count)
                      RS_LAMBDA { visit(i, run * cols + j, w, count); });
  }
};

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {
namespace {

template <class Codes>
void choose(Row& row, bool grouped) {
  grouped ? fill_float_slots<PaletteRows<Codes, true>>(row)
          : fill_float_slots<PaletteRows<Codes, false>>(row);
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
