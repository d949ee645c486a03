// Palettes on AVX-512 (BW, VBMI, VNNI).
//
// linear   the codes of a block are shifted into the low bits of 16-bit words, where vpermw looks
//          them up among 32 int16 entries: a smaller codebook repeats, so bits above a code change
//          nothing. Words of 3 dense bits are cut by vpermb and vpmultishiftqb. Codes of a pair are
//          in 32-bit lanes, where vpermi2d finds two int16 entries at once.
// decode   the bytes that hold a code by vpermb into 32-bit lanes, shifted by lane, looked up.
#include "fast.h"

#if RS_FAST_X86
#include <bit>

#include "../codecs/palette.h"
#include "half.h"
#include "lanes.h"

namespace rs {
namespace {

// Bytes of a block spread over 64-bit words: quadword q gets `bytes` from bytes * q on, and 16-bit
// word i of it the 16 bits from bit `bits` * i on.
struct Spread {
  Bytes bytes{}, cut{};
  constexpr Spread(int bytes_each, int bits, int word_bytes) {
    for (int i = 0; i < 64; ++i) {
      bytes.at[i] = static_cast<uint8_t>(i % 8 < bytes_each ? bytes_each * (i / 8) + i % 8 : 63);
      cut.at[i] = static_cast<uint8_t>(bits * (i % 8 / word_bytes) + 8 * (i % 8 % word_bytes));
    }
  }
};
constexpr Spread kThreeBits(6, 12, 2);   // four codes of 3 bits to a word
constexpr Spread kPairCodes(5, 20, 4);   // four codes of 5 bits to a 32-bit lane

// Where the codes of a chunk lie: 16 at a time, the two bytes that hold a code, and its place in
// them.
template <int Count>
struct Places {
  alignas(64) uint8_t bytes[Count / 16][64]{};
  alignas(64) uint32_t shift[Count / 16][16]{};
  constexpr Places(int bits, int per_word) {  // per_word codes to 16 bits, or 0: back to back
    for (int j = 0; j < Count; ++j) {
      const int at = per_word ? j / per_word * 16 + j % per_word * bits : j * bits;
      for (int t = 0; t < 4; ++t)
        bytes[j / 16][j % 16 * 4 + t] = static_cast<uint8_t>(at / 8 + (t & 1));
      shift[j / 16][j % 16] = static_cast<uint32_t>(at % 8);
    }
  }
};
template <int Bits>
struct DenseChunk {
  static constexpr int kCodes = 32, kBytes = 4 * Bits;
  static constexpr Places<kCodes> kPlaces{Bits, 0};
};
struct WordChunk {
  static constexpr int kCodes = 80, kBytes = 32;
  static constexpr Places<kCodes> kPlaces{3, 5};
};
struct PairChunk {
  static constexpr int kCodes = 16, kBytes = 10;
  static constexpr Places<kCodes> kPlaces{5, 0};
};

// Pairs of lanes of two registers, in two halves.
struct Interleave {
  alignas(64) uint32_t at[2][16]{};
  constexpr Interleave() {
    for (int i = 0; i < 32; ++i) at[i / 16][i % 16] = static_cast<uint32_t>(i / 2 + i % 2 * 16);
  }
};
constexpr Interleave kInterleave;

// An entry as decode stores it.
inline uint32_t entry_bits(float value, float) { return std::bit_cast<uint32_t>(value); }
inline uint32_t entry_bits(float value, uint16_t) { return to_bf16(value); }

}  // namespace
}  // namespace rs

#include "avx512.h"
#include "lanes_avx512.h"

namespace rs {
namespace {

// Words of Parts codes of Bits bits each.
template <int Bits, int Parts, int BlockBytes>
struct ScalarView {
  static constexpr int kParts = Parts, kLane = 1, kBytes = BlockBytes, kEntries = 1 << Bits;
  static constexpr bool kScaled = false;
  __m512i entries;

  RS_INLINE explicit ScalarView(const int16_t* table) : entries(load(table)) {}
  RS_INLINE __m512i words(__m512i codes) const {
    if constexpr (BlockBytes == 48)
      return _mm512_multishift_epi64_epi8(
          load(kThreeBits.cut.at), _mm512_permutexvar_epi8(load(kThreeBits.bytes.at), codes));
    return codes;
  }
  template <int K>
  RS_INLINE __m512i lookup(__m512i words) const {
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(words, K * Bits), entries);
  }
};

struct PairView {
  static constexpr int kParts = 4, kLane = 2, kBytes = 40, kEntries = 64;
  static constexpr bool kScaled = false;
  __m512i low, high;

  RS_INLINE explicit PairView(const int16_t* table) : low(load(table)), high(load(table + 32)) {}
  RS_INLINE __m512i words(__m512i codes) const {
    return _mm512_multishift_epi64_epi8(
        load(kPairCodes.cut.at), _mm512_permutexvar_epi8(load(kPairCodes.bytes.at), codes));
  }
  template <int K>
  RS_INLINE __m512i lookup(__m512i words) const {
    return _mm512_permutex2var_epi32(low, _mm512_srli_epi32(words, K * 5), high);
  }
};

template <class Chunk>
RS_INLINE __m512i codes_at(__m512i bytes, int i) {
  return _mm512_srlv_epi32(_mm512_permutexvar_epi8(load(Chunk::kPlaces.bytes[i]), bytes),
                           load(Chunk::kPlaces.shift[i]));
}

// n weights of one codebook from `size` bytes; `table` is its entries, repeated to sixteen.
template <class Chunk, class T>
RS_INLINE void decode_run(const uint8_t* codes, int64_t size, int64_t n, __m512i table, T* w) {
  for (; n > 0; n -= Chunk::kCodes, codes += Chunk::kBytes, w += Chunk::kCodes) {
    const __m512i bytes =
        _mm512_maskz_loadu_epi8(first_bytes(std::min<int64_t>(Chunk::kBytes, size)), codes);
    size -= Chunk::kBytes;
    for (int i = 0; i < Chunk::kCodes / 16; ++i)
      store_lanes(w + 16 * i, _mm512_permutexvar_epi32(codes_at<Chunk>(bytes, i), table),
                  first_lanes(n - 16 * i));
  }
}

template <class Chunk, int Entries, bool Grouped, class T>
void decode(const Layer& layer, int64_t row0, int64_t row1, T* w) {
  // A row is one run when all of it has one codebook.
  const int64_t runs = Grouped ? layer.tile_cols() : 1, cols = layer.in / runs;
  const int64_t size = layer.tile_cols() / runs * layer.tile.bytes;
  alignas(64) uint32_t entries[16];
  for (int64_t run = row0 * runs; run < row1 * runs; ++run) {
    if (Grouped || run == row0) {
      const float* book = layer.params[0] + (Grouped ? run * Entries : 0);
      for (int i = 0; i < 16; ++i) entries[i] = entry_bits(book[i % Entries], T{});
    }
    decode_run<Chunk>(layer.codes + run * size, size, cols, load(entries), w);
    w += cols;
  }
}

template <class T>
void decode_pairs(const Layer& layer, int64_t row0, int64_t row1, T* w) {
  alignas(64) uint32_t first[32], second[32];
  for (int i = 0; i < 32; ++i) {
    first[i] = entry_bits(layer.params[0][2 * i], T{});
    second[i] = entry_bits(layer.params[0][2 * i + 1], T{});
  }
  const __m512i first0 = load(first), first1 = load(first + 16);
  const __m512i second0 = load(second), second1 = load(second + 16);
  const __m512i low = load(kInterleave.at[0]), high = load(kInterleave.at[1]);
  const int64_t size = (row1 - row0) * layer.tile_cols() * 5;
  const uint8_t* codes = layer.codes + row0 * layer.tile_cols() * 5;
  for (int64_t at = 0; at < size; at += PairChunk::kBytes, w += 32) {
    const __m512i bytes = _mm512_maskz_loadu_epi8(
        first_bytes(std::min<int64_t>(PairChunk::kBytes, size - at)), codes + at);
    const __m512i code = codes_at<PairChunk>(bytes, 0);
    const __m512i a = _mm512_permutex2var_epi32(first0, code, first1);
    const __m512i b = _mm512_permutex2var_epi32(second0, code, second1);
    store_lanes(w, _mm512_permutex2var_epi32(a, low, b), 0xFFFF);
    if (size - at > 5) store_lanes(w + 16, _mm512_permutex2var_epi32(a, high, b), 0xFFFF);
  }
}

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {
namespace {

template <class View>
void linear(const Layer& layer, const float* x, int64_t m, float* y) {
  const IntegerTable table(layer.params[0], View::kEntries);
  lane_linear(layer, x, m, y, table, View::kParts, View::kLane, kLaneKernels<View>);
}

template <class View>
void fill_linear(Row& row) {
  row.linear = linear<View>;
  row.linear_max_m = 2 * kMaxBatch;
  row.linear_type = "16-bit codebook and activations per row";
}

template <class Chunk, class View>
void fill(Row& row, bool grouped) {
  constexpr int kEntries = View::kEntries;
  row.decode = grouped ? decode<Chunk, kEntries, true, float> : decode<Chunk, kEntries, false, float>;
  row.decode_bf16 =
      grouped ? decode<Chunk, kEntries, true, uint16_t> : decode<Chunk, kEntries, false, uint16_t>;
  if (!grouped) fill_linear<View>(row);
}

}  // namespace

void palette_avx512_slots(Row& row, PaletteLayout layout, int bits, bool grouped) {
  if (layout == PaletteLayout::pair) {
    row.decode = decode_pairs<float>;
    row.decode_bf16 = decode_pairs<uint16_t>;
    return fill_linear<PairView>(row);
  }
  if (layout == PaletteLayout::words) return fill<WordChunk, ScalarView<3, 5, 64>>(row, grouped);
  switch (bits) {
    case 1:
      return fill<DenseChunk<1>, ScalarView<1, 16, 64>>(row, grouped);
    case 2:
      return fill<DenseChunk<2>, ScalarView<2, 8, 64>>(row, grouped);
    case 3:
      return fill<DenseChunk<3>, ScalarView<3, 4, 48>>(row, grouped);
    case 4:
      return fill<DenseChunk<4>, ScalarView<4, 4, 64>>(row, grouped);
  }
}

}  // namespace rs
#endif
