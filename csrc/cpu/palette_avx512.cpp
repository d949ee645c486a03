// Palettes on AVX-512 (BW, VBMI, VNNI).
//
// linear   the codes of a block are shifted into the low bits of 16-bit words, where vpermw looks
//          them up among 32 int16 entries: a smaller codebook repeats, so bits above a code change
//          nothing. Words of 3 dense bits are cut by vpermb and vpmultishiftqb. Codes of a pair are
//          in 32-bit lanes, where vpermi2d finds two int16 entries at once.
//          Codebooks of groups of 128 * 2^n weights of 3 or 4 bits become int16 as they are met, in
//          units of a power of two of each; of 16 weights or 1 bit they are looked up in float32,
//          as decode does, and others are left to AVX2.
// adjoint  of one codebook: codes as in decode, sums by code in registers.
// decode   the bytes that hold a code by vpermb into 32-bit lanes, shifted by lane, looked up.
#include "fast.h"

#if RS_FAST_X86
#include "../codecs/palette.h"
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
constexpr Spread kThreeBits(6, 12, 2);  // four codes of 3 bits to a word
constexpr Spread kPairCodes(5, 20, 4);  // four codes of 5 bits to a 32-bit lane

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

// Even and odd lanes of two registers.
struct Parity {
  alignas(64) uint32_t at[2][16]{};
  constexpr Parity() {
    for (int i = 0; i < 32; ++i) at[i % 2][i / 2] = static_cast<uint32_t>(i);
  }
};
constexpr Parity kParity;

}  // namespace
}  // namespace rs

#include "avx512.h"
#include "bins_avx512.h"
#include "lanes_avx512.h"

namespace rs {
namespace {

// Words of Parts codes of Bits bits each.
template <int Bits, int Parts, int BlockBytes>
struct ScalarView {
  static constexpr int kParts = Parts, kLane = 1, kBytes = BlockBytes, kEntries = 1 << Bits;
  static constexpr bool kScaled = false, kPrepared = false;
  __m512i entries;

  RS_INLINE explicit ScalarView(const int16_t* table) : entries(load(table)) {}
  RS_INLINE __m512i words(__m512i codes) const { return spread(codes); }
  static RS_INLINE __m512i spread(__m512i codes) {
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

RS_INLINE __m512i magnitude(__m512i x) {
  return _mm512_and_si512(x, _mm512_set1_epi32(0x7FFFFFFF));
}

// Blocks of 128 weights, each with the codebook of its group. The codebooks of a row share a unit.
template <int Bits>
struct GroupView {
  using Scalar = ScalarView<Bits, 4, 16 * Bits>;
  static constexpr int kParts = 4, kLane = 1, kBytes = 16 * Bits, kBlock = 128;
  static constexpr bool kScaled = false, kPrepared = true;
  struct Words {
    __m512i codes, entries;
  };
  const float* all;
  int64_t size;     // entries of a row
  int blocks_log2;  // in a group

  RS_INLINE explicit GroupView(const Layer& layer)
      : all(layer.params[0]),
        size(layer.tile_cols() << Bits),
        blocks_log2(std::countr_zero(static_cast<uint64_t>(layer.tile.cols / kBlock))) {}
  RS_INLINE float prepare(int64_t row, int place, int16_t* books) const {
    const float* from = all + row * size;
    int16_t* to = books + place * size;
    const int64_t whole = size / 16 * 16;
    const __mmask16 rest = first_lanes(size - whole);
    __m512i peak = magnitude(_mm512_maskz_loadu_epi32(rest, from + whole));
    for (int64_t i = 0; i < whole; i += 16)
      peak = _mm512_max_epu32(peak, magnitude(load(from + i)));
    const Quantum quantum(_mm512_reduce_max_epu32(peak), kTableTop);
    const __m512 inverse = _mm512_set1_ps(quantum.inverse);
    const auto entries = [&](__m512 book) RS_LAMBDA {
      return _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(book, inverse)));
    };
    for (int64_t i = 0; i < whole; i += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), entries(_mm512_loadu_ps(from + i)));
    if (rest)
      _mm256_mask_storeu_epi16(to + whole, rest,
                               entries(_mm512_maskz_loadu_ps(rest, from + whole)));
    return quantum.unit;
  }
  RS_INLINE Words words(__m512i codes, int64_t row, int place, int64_t block,
                        const int16_t* books) const {
    const int64_t book = block >> blocks_log2 << Bits;
    _mm_prefetch(all + (row + kMaxLaneRows) * size + book, _MM_HINT_T0);
    const int16_t* at = books + place * size + book;
    if constexpr (Bits == 4)
      return {Scalar::spread(codes),
              _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)))};
    else
      return {Scalar::spread(codes),
              _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)))};
  }
  template <int K>
  RS_INLINE __m512i lookup(const Words& words) const {
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(words.codes, K * Bits), words.entries);
  }
};

struct PairView {
  static constexpr int kParts = 4, kLane = 2, kBytes = 40, kEntries = 64;
  static constexpr bool kScaled = false, kPrepared = false;
  __m512i low, high;

  RS_INLINE explicit PairView(const int16_t* table) : low(load(table)), high(load(table + 32)) {}
  RS_INLINE __m512i words(__m512i codes) const {
    return _mm512_multishift_epi64_epi8(load(kPairCodes.cut.at),
                                        _mm512_permutexvar_epi8(load(kPairCodes.bytes.at), codes));
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

// A codebook as often as it fits.
template <int Entries>
RS_INLINE __m512 repeated(const float* book) {
  if constexpr (Entries == 16) return _mm512_loadu_ps(book);
  if constexpr (Entries == 8) return _mm512_broadcast_f32x8(_mm256_loadu_ps(book));
  if constexpr (Entries == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(book));
  return _mm512_mask_mov_ps(_mm512_set1_ps(book[0]), 0xAAAA, _mm512_set1_ps(book[1]));
}

// As decode stores them: all bits, or bfloat16 in the lower 16, where a NaN becomes the quiet one.
RS_INLINE __m512i stored(__m512 x, float) { return _mm512_castps_si512(x); }
RS_INLINE __m512i stored(__m512 x, uint16_t) {
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_srli_epi32(_mm512_mask_mov_epi32(round_bf16(x), nan, _mm512_set1_epi32(0x7FC00000)),
                           16);
}

// The entries of n weights of one codebook from `size` bytes, 16 at a time. `table` is the
// codebook, repeated to sixteen.
template <class Chunk, class Visit>
RS_INLINE void look_up(const uint8_t* codes, int64_t size, int64_t n, __m512i table, Visit visit) {
  constexpr int kVectors = Chunk::kCodes / 16;
  int64_t j = 0;
  for (; j + Chunk::kCodes <= n; j += Chunk::kCodes, codes += Chunk::kBytes) {
    const __m512i bytes = _mm512_maskz_loadu_epi8(first_bytes(Chunk::kBytes), codes);
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i)
      visit(i, j + 16 * i, _mm512_permutexvar_epi32(codes_at<Chunk>(bytes, i), table), 0xFFFF);
  }
  if (j == n) return;
  const __m512i bytes =
      _mm512_maskz_loadu_epi8(first_bytes(size - j / Chunk::kCodes * Chunk::kBytes), codes);
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i)
    visit(i, j + 16 * i, _mm512_permutexvar_epi32(codes_at<Chunk>(bytes, i), table),
          first_lanes(n - j - 16 * i));
}

// Tiles [tile0, tile1) of a row: one run of codes when they have one codebook.
template <class Chunk, int Entries, bool Grouped, class T, class Visit>
RS_INLINE void each_run(const Layer& layer, int64_t row, int64_t tile0, int64_t tile1,
                        Visit visit) {
  const int64_t n = layer.tile_cols(), run = Grouped ? 1 : tile1 - tile0;
  const int64_t cols = run * layer.tile.cols, size = run * layer.tile.bytes;
  const uint8_t* codes = layer.codes + (row * n + tile0) * layer.tile.bytes;
  const float* book = layer.params[0] + (Grouped ? (row * n + tile0) * Entries : 0);
  for (int64_t first = tile0 * layer.tile.cols; tile0 < tile1; tile0 += run) {
    look_up<Chunk>(codes, size, cols, stored(repeated<Entries>(book), T{}),
                   [&](int i, int64_t j, __m512i value, __mmask16 mask)
                       RS_LAMBDA { visit(i, first + j, value, mask); });
    codes += size;
    first += cols;
    book += Grouped ? Entries : 0;
  }
}

template <class Chunk, int Entries, bool Grouped, class T>
void decode(const Layer& layer, int64_t row0, int64_t row1, T* w) {
  for (int64_t row = row0; row < row1; ++row, w += layer.in)
    each_run<Chunk, Entries, Grouped, T>(layer, row, 0, layer.tile_cols(),
                                         [&](int, int64_t j, __m512i value, __mmask16 mask)
                                             RS_LAMBDA { store_lanes(w + j, value, mask); });
}

// Adds dw[(row1-row0) * in] of the weights of each entry of one codebook to total[Entries].
template <class Chunk, int Entries>
void sum_entries(const Layer& layer, int64_t row0, int64_t row1, const float* dw, double* total) {
  const __m512i numbers =
      _mm512_and_si512(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                       _mm512_set1_epi32(Entries - 1));
  const int64_t size = layer.tile_cols() * layer.tile.bytes;
  Bins<Entries> bins;
  for (int64_t row = row0; row < row1; ++row, dw += layer.in) {
    look_up<Chunk>(layer.codes + row * size, size, layer.in, numbers,
                   [&](int, int64_t j, __m512i code, __mmask16 mask)
                       RS_LAMBDA { bins.add(code, _mm512_maskz_loadu_ps(mask, dw + j), mask); });
    bins.drain(total);
  }
}

template <class Chunk, int Entries>
struct GroupedRows {
  static constexpr bool kGrouped = true;
  const Layer& layer;

  explicit GroupedRows(const Layer& layer) : layer(layer) {}
  template <class Visit>
  RS_INLINE void each(int64_t row, int64_t tile0, int64_t tile1, Visit visit) const {
    each_run<Chunk, Entries, true, float>(
        layer, row, tile0, tile1, [&](int i, int64_t j, __m512i value, __mmask16 mask) RS_LAMBDA {
          visit(i, j, _mm512_castsi512_ps(value), mask);
        });
  }
};

template <class T>
void decode_pairs(const Layer& layer, int64_t row0, int64_t row1, T* w) {
  __m512i book[4];
  for (int i = 0; i < 4; ++i) book[i] = stored(_mm512_loadu_ps(layer.params[0] + 16 * i), T{});
  const __m512i even = load(kParity.at[0]), odd = load(kParity.at[1]);
  const __m512i first0 = _mm512_permutex2var_epi32(book[0], even, book[1]);
  const __m512i first1 = _mm512_permutex2var_epi32(book[2], even, book[3]);
  const __m512i second0 = _mm512_permutex2var_epi32(book[0], odd, book[1]);
  const __m512i second1 = _mm512_permutex2var_epi32(book[2], odd, book[3]);
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

template <class Chunk, int Entries>
void adjoint(const Layer& layer, int64_t row0, int64_t row1, const float* dw, float* const* grads) {
  if (!grads[0]) return;
  double total[Entries] = {};
  sum_entries<Chunk, Entries>(layer, row0, row1, dw, total);
  for (int e = 0; e < Entries; ++e) grads[0][e] += static_cast<float>(total[e]);
}

template <class View>
void fill_linear(Row& row) {
  row.linear = linear<View>;
  row.linear_max_m = 2 * kMaxBatch;
  row.linear_type = "16-bit codebook and activations per row";
}

template <class Chunk, int Entries>
void grouped_linear(const Layer& layer, const float* x, int64_t m, float* y) {
  float_linear(layer, x, m, y, kFloatKernels<GroupedRows<Chunk, Entries>>);
}

template <int Bits>
void group_linear(const Layer& layer, const float* x, int64_t m, float* y) {
  using View = GroupView<Bits>;
  const float one = 1.0f;
  IntegerTable table(&one, 1);  // not looked at
  lane_linear(layer, x, m, y, table, View::kParts, View::kLane, kLaneKernels<View>,
              kMaxLaneRows * (layer.tile_cols() << Bits));
}

template <int Bits>
void fill_groups(Row& row) {
  const int64_t group = row.tile.cols, block = GroupView<Bits>::kBlock;
  if (group < block || !std::has_single_bit(static_cast<uint64_t>(group))) return;
  row.linear = group_linear<Bits>;
  row.linear_max_m = 2 * kMaxBatch;
  row.linear_type = "16-bit codebooks and activations per row";
}

template <class Chunk, class View>
void fill(Row& row, bool grouped) {
  constexpr int kEntries = View::kEntries;
  row.decode =
      grouped ? decode<Chunk, kEntries, true, float> : decode<Chunk, kEntries, false, float>;
  row.decode_bf16 =
      grouped ? decode<Chunk, kEntries, true, uint16_t> : decode<Chunk, kEntries, false, uint16_t>;
  if (!grouped) {
    row.adjoint = adjoint<Chunk, kEntries>;
    return fill_linear<View>(row);
  }
  // Of others, the product on AVX2 has less to do for each group.
  if (kEntries == 2 || row.tile.cols == 16) row.linear = grouped_linear<Chunk, kEntries>;
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
      fill<DenseChunk<3>, ScalarView<3, 4, 48>>(row, grouped);
      return grouped ? fill_groups<3>(row) : void();
    case 4:
      fill<DenseChunk<4>, ScalarView<4, 4, 64>>(row, grouped);
      return grouped ? fill_groups<4>(row) : void();
  }
}

}  // namespace rs
#endif
