// Hierarchical codes on AVX-512 (BW, VBMI, VNNI).
//
// linear   mode=mul: a tile is a 32-bit lane. Four bits of it, two deltas, find two int16
//          multipliers at once by vpermd; after four lookups the lane's sum meets its base.
//          mode=xor: the four weights that a tile's base stands for as int16, of all tiles of a
//          block in two registers; then each weight's delta chooses among them.
// adjoint  as decode; sums by entry in registers.
// decode   eight 32-bit lanes per tile, each shifted to its own delta. To bfloat16 the four values
// of
//          every tile first, rounded, and each weight's from two registers of them.
#include "fast.h"

#if RS_FAST_X86
#include "../codecs/hierarchical.h"
#include "lanes.h"

namespace rs {
namespace {

// Lane l of tiles 2i and 2i + 1: its tile, and the place of its delta.
struct Spread {
  alignas(64) uint32_t tile[8][16]{}, shift[16]{};
  constexpr Spread() {
    for (int l = 0; l < 16; ++l) {
      for (int i = 0; i < 8; ++i) tile[i][l] = static_cast<uint32_t>(2 * i + l / 8);
      shift[l] = static_cast<uint32_t>(16 + 2 * (l % 8));
    }
  }
};
constexpr Spread kSpread;

// Of weights 32j and following of a block of sixteen tiles: the tile, and where in its doubled
// 32 bits the delta is, four bits too low.
struct Chosen {
  alignas(64) uint32_t from[4][16]{};
  alignas(64) uint16_t tile[4][32]{}, upper[32]{};
  Bytes deltas{};
  constexpr Chosen() {
    for (int i = 0; i < 64; ++i) {
      for (int j = 0; j < 4; ++j) {
        from[j][i / 4] = static_cast<uint32_t>(4 * j + i / 16);
        tile[j][i / 2] = static_cast<uint16_t>(4 * j + i / 16);
      }
      upper[i / 2] = static_cast<uint16_t>(i | 1);
      deltas.at[i] = static_cast<uint8_t>(12 + i / 2 % 8 * 2 + i % 2 * 8);
    }
  }
};
constexpr Chosen kChosen;

template <bool Xor>
constexpr int kEntries = Xor ? XorMode::kEntries : MulMode::kEntries;

struct Words {
  alignas(64) uint32_t at[16];
};
constexpr Words kMasks = {
    {0, 0xF0, 0xF00, 0xFF, 0, 0xF0, 0xF00, 0xFF, 0, 0xF0, 0xF00, 0xFF, 0, 0xF0, 0xF00, 0xFF}};
struct alignas(64) Cosines {
  float at[16];
};
constexpr float cosine(int times127) { return static_cast<float>(times127) / 8192; }
constexpr Cosines kCosines = {{cosine(127), cosine(117), cosine(90), cosine(49), cosine(0),
                               cosine(-49), cosine(-90), cosine(-117), cosine(-127), cosine(-117),
                               cosine(-90), cosine(-49), cosine(0), cosine(49), cosine(90),
                               cosine(117)}};

// Words of a block of sixteen tiles. A base stands for a value by delta: register h holds those of
// delta 2h, all tiles, and then those of delta 2h + 1. `change` is their masks.
struct XorBlock {
  alignas(64) uint16_t base[32]{}, change[2][32]{}, tile[32]{};
  // By amp: kept bits, bits that change in the mask, and both for the sign; see values().
  alignas(64) uint16_t turned[2][32]{}, kept[2][32]{};
  Bytes deltas{};  // of word i the 16 bits from delta i % 2 of its tile on
  constexpr XorBlock() {
    constexpr int kMask[4] = {0, 0xF0, 0xF00, 0xFF}, kAmp = 0x3F0 << 5, kSign = 0x8000;
    for (int i = 0; i < 32; ++i) {
      base[i] = static_cast<uint16_t>(i % 16 * 2);
      tile[i] = static_cast<uint16_t>(i / 2);
      for (int h = 0; h < 2; ++h) {
        const int mask = kMask[2 * h + i / 16], amp = mask << 5 & kAmp;
        change[h][i] = static_cast<uint16_t>(mask);
        turned[h][i] = static_cast<uint16_t>((kAmp & ~amp) | kSign);
        kept[h][i] = static_cast<uint16_t>(amp | kSign);
      }
    }
    for (int i = 0; i < 64; ++i)
      deltas.at[i] = static_cast<uint8_t>(i / 4 % 2 * 32 + 16 + i / 2 % 2 * 2 + i % 2 * 8);
  }
};
constexpr XorBlock kXorBlock;

// -256 T by diff and phase.
struct XorTurns {
  alignas(64) int16_t at[64]{};
  constexpr XorTurns() {
    for (int i = 0; i < 64; ++i)
      at[i] = static_cast<int16_t>(-256 * kCyclic[0][(i / 4 + i % 4 * 4) & 15]);
  }
};
constexpr XorTurns kXorTurns;

}  // namespace
}  // namespace rs

#include "avx512.h"
#include "bins_avx512.h"
#include "lanes_avx512.h"

namespace rs {
namespace {

struct MulView {
  static constexpr int kParts = 4, kLane = 2, kBytes = 64;
  static constexpr bool kScaled = true, kPrepared = false;
  __m512i pairs;

  // Entry e holds the multipliers of deltas e % 4 and e / 4.
  RS_INLINE explicit MulView(const int16_t* table) {
    alignas(64) int16_t at[32];
    for (int e = 0; e < 16; ++e) at[2 * e] = table[e % 4], at[2 * e + 1] = table[e / 4];
    pairs = load(at);
  }
  RS_INLINE __m512i words(__m512i codes) const { return codes; }
  template <int K>
  RS_INLINE __m512i lookup(__m512i words) const {
    return _mm512_permutexvar_epi32(_mm512_srli_epi32(words, 16 + 4 * K), pairs);
  }
  RS_INLINE __m512 scale(__m512i words) const {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words, 16), 16));
  }
};

struct XorView {
  static constexpr int kParts = 4, kLane = 2, kBytes = 64;
  static constexpr bool kScaled = false, kPrepared = false;
  struct Words {
    __m512i values[2], deltas;
  };
  __m512i levels;

  RS_INLINE explicit XorView(const int16_t* table) : levels(load(table)) {}
  // 4 T (amp + 1), exactly: -256 T times -512 (amp + 1), which is the complement of amp at the top
  // of a word with ones below.
  template <int Half>
  static RS_INLINE __m512i factors(__m512i code, __m512i amp) {
    const __m512i turn = _mm512_permutex2var_epi16(load(kXorTurns.at), _mm512_srli_epi16(code, 10),
                                                   load(kXorTurns.at + 32));
    return _mm512_mulhrs_epi16(turn, _mm512_ternarylogic_epi32(amp, load(kXorBlock.turned[Half]),
                                                               load(kXorBlock.kept[Half]), 0xAC));
  }
  RS_INLINE Words words(__m512i codes) const {
    const __m512i base = _mm512_permutexvar_epi16(load(kXorBlock.base), codes);
    const __m512i amp = _mm512_slli_epi16(base, 5);
    const __m512i changed = _mm512_xor_si512(base, load(kXorBlock.change[1]));
    // Delta 1 changes neither turn nor level.
    return {
        {_mm512_mulhrs_epi16(factors<0>(base, amp), _mm512_permutexvar_epi16(base, levels)),
         _mm512_mulhrs_epi16(factors<1>(changed, amp), _mm512_permutexvar_epi16(changed, levels))},
        _mm512_multishift_epi64_epi8(load(kXorBlock.deltas.at), codes)};
  }
  // A value's place: its tile, and above that the delta.
  template <int K>
  RS_INLINE __m512i lookup(const Words& words) const {
    const __m512i delta = K == 0   ? _mm512_slli_epi16(words.deltas, 4)
                          : K == 1 ? words.deltas
                                   : _mm512_srli_epi16(words.deltas, K == 2 ? 4 : 8);
    const __m512i at =
        _mm512_ternarylogic_epi32(delta, _mm512_set1_epi16(0x30), load(kXorBlock.tile), 0xEA);
    return _mm512_permutex2var_epi16(words.values[0], at, words.values[1]);
  }
};

// Sixteen weights are factors times entries of the table; upper bits of `entry` count for nothing.
struct Weights {
  __m512 factor;
  __m512i entry;
};

RS_INLINE Weights mul_weights(__m512i tile, __m512i delta) {
  const __m512i base = _mm512_srai_epi32(_mm512_slli_epi32(tile, 16), 16);
  return {_mm512_mul_ps(_mm512_cvtepi32_ps(base), _mm512_set1_ps(1.0f / 512)), delta};
}

RS_INLINE Weights xor_weights(__m512i tile, __m512i delta) {
  const __m512i code = _mm512_xor_si512(tile, _mm512_permutexvar_epi32(delta, load(kMasks.at)));
  // The lookup heeds the low four bits: those above the phase need no mask.
  const __m512i turn =
      _mm512_add_epi32(_mm512_srli_epi32(code, 12),
                       _mm512_and_si512(_mm512_srli_epi32(code, 8), _mm512_set1_epi32(12)));
  const __m512i amp = _mm512_add_epi32(
      _mm512_and_si512(_mm512_srli_epi32(code, 4), _mm512_set1_epi32(63)), _mm512_set1_epi32(1));
  const __m512 cosine = _mm512_permutexvar_ps(turn, _mm512_load_ps(kCosines.at));
  return {_mm512_mul_ps(cosine, _mm512_cvtepi32_ps(amp)), code};  // exact
}

template <bool Xor, class Visit>
RS_INLINE void each_vector(const Layer& layer, int64_t row, Visit visit) {
  const auto vector = [&](__m512i tiles, int i) RS_LAMBDA {
    const __m512i tile = _mm512_permutexvar_epi32(load(kSpread.tile[i]), tiles);
    const __m512i delta = _mm512_srlv_epi32(tile, load(kSpread.shift));
    return Xor ? xor_weights(tile, delta) : mul_weights(tile, delta);
  };
  const uint8_t* codes = layer.codes + row * layer.tile_cols() * 4;
  int64_t j = 0;
  for (; j + 128 <= layer.in; j += 128, codes += 64) {
    const __m512i tiles = load(codes);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) visit(j + 16 * i, vector(tiles, i), 0xFFFF);
  }
  if (j == layer.in) return;
  const __m512i tiles = _mm512_maskz_loadu_epi32(first_lanes((layer.in - j) / 8), codes);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    visit(j + 16 * i, vector(tiles, i), first_lanes(layer.in - j - 16 * i));
}

template <bool Xor>
RS_INLINE __m512 entries_of(const Layer& layer) {
  alignas(64) float table[16];
  for (int i = 0; i < 16; ++i) table[i] = quiet(layer.params[0][i % kEntries<Xor>]);
  return _mm512_load_ps(table);
}

template <bool Xor>
void decode_rows(const Layer& layer, int64_t row0, int64_t row1, float* w) {
  const __m512 entries = entries_of<Xor>(layer);
  for (int64_t row = row0; row < row1; ++row, w += layer.in)
    each_vector<Xor>(layer, row, [&](int64_t j, Weights at, __mmask16 mask) RS_LAMBDA {
      _mm512_mask_storeu_ps(w + j, mask,
                            _mm512_mul_ps(at.factor, _mm512_permutexvar_ps(at.entry, entries)));
    });
}

// The values of deltas `first` and first + 1 of sixteen tiles, in bfloat16.
template <bool Xor>
RS_INLINE __m512i two_values(__m512i tiles, __m512 entries, int first) {
  __m512i rounded[2];
  for (int i = 0; i < 2; ++i) {
    const __m512i delta = _mm512_set1_epi32(first + i);
    const Weights at = Xor ? xor_weights(tiles, delta) : mul_weights(tiles, delta);
    rounded[i] = round_bf16(_mm512_mul_ps(at.factor, _mm512_permutexvar_ps(at.entry, entries)));
  }
  return _mm512_permutex2var_epi16(rounded[0], load(kChosen.upper), rounded[1]);
}

template <bool Xor>
void decode_bf16_rows(const Layer& layer, int64_t row0, int64_t row1, uint16_t* w) {
  const __m512 entries = entries_of<Xor>(layer);
  const uint8_t* codes = layer.codes + row0 * layer.tile_cols() * 4;
  for (int64_t row = row0; row < row1; ++row)
    for (int64_t n = layer.in; n > 0; n -= 128) {
      const int64_t columns = std::min<int64_t>(n, 128);
      const __m512i tiles = _mm512_maskz_loadu_epi32(first_lanes(columns / 8), codes);
      const __m512i low = two_values<Xor>(tiles, entries, 0);
      const __m512i high = two_values<Xor>(tiles, entries, 2);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m512i delta = _mm512_multishift_epi64_epi8(
            load(kChosen.deltas.at), _mm512_permutexvar_epi32(load(kChosen.from[j]), tiles));
        const __m512i at =
            _mm512_ternarylogic_epi32(delta, _mm512_set1_epi16(0x30), load(kChosen.tile[j]), 0xEA);
        _mm512_mask_storeu_epi16(w + 32 * j, static_cast<__mmask32>(first_bytes(columns - 32 * j)),
                                 _mm512_permutex2var_epi16(low, at, high));
      }
      codes += columns / 8 * 4;
      w += columns;
    }
}

// Adds factor * dw[(row1-row0) * in] of the weights of each entry to total.
template <bool Xor>
void sum_entries(const Layer& layer, int64_t row0, int64_t row1, const float* dw, double* total) {
  const __m512i number = _mm512_set1_epi32(kEntries<Xor> - 1);
  Bins<kEntries<Xor>> bins;
  for (int64_t row = row0; row < row1; ++row, dw += layer.in) {
    each_vector<Xor>(layer, row, [&](int64_t j, Weights at, __mmask16 mask) RS_LAMBDA {
      bins.add(_mm512_and_si512(at.entry, number),
               _mm512_mul_ps(at.factor, _mm512_maskz_loadu_ps(mask, dw + j)), mask);
    });
    bins.drain(total);
  }
}

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {
namespace {

void linear_mul(const Layer& layer, const float* x, int64_t m, float* y) {
  IntegerTable table(layer.params[0], MulMode::kEntries);
  table.unit *= 1.0f / 512;
  lane_linear(layer, x, m, y, table, MulView::kParts, MulView::kLane, kLaneKernels<MulView>);
}

void linear_xor(const Layer& layer, const float* x, int64_t m, float* y) {
  const IntegerTable table(layer.params[0], kXorLevels);
  lane_linear(layer, x, m, y, table, XorView::kParts, XorView::kLane, kLaneKernels<XorView>);
}

template <bool Xor>
void adjoint(const Layer& layer, int64_t row0, int64_t row1, const float* dw, float* const* grads) {
  if (!grads[0]) return;
  double total[kEntries<Xor>] = {};
  sum_entries<Xor>(layer, row0, row1, dw, total);
  for (int e = 0; e < kEntries<Xor>; ++e) grads[0][e] += static_cast<float>(total[e]);
}

}  // namespace

void hierarchical_avx512_slots(Row& row, bool exclusive_or) {
  row.decode = exclusive_or ? decode_rows<true> : decode_rows<false>;
  row.decode_bf16 = exclusive_or ? decode_bf16_rows<true> : decode_bf16_rows<false>;
  row.adjoint = exclusive_or ? adjoint<true> : adjoint<false>;
  row.linear = exclusive_or ? linear_xor : linear_mul;
  row.linear_max_m = 2 * kMaxBatch;
  row.linear_type = exclusive_or ? "16-bit weights and activations per row"
                                 : "16-bit multipliers and activations per row";
}

}  // namespace rs
#endif
