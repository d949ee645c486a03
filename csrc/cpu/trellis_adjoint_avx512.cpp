// Gradient of the trellis's table on AVX-512 (BW, VBMI): the states of a tile are hashed 32 at a
// time.
#include "fast.h"

#if RS_FAST_X86
#include <array>

#include "trellis_cuts.h"
#include "trellis_histograms.h"
#include "trellis_integers.h"

namespace rs {
namespace {

// States 32 * g to 32 * g + 31 in their order.
template <int K>
constexpr std::array<Cut, 4> state_cuts() {
  std::array<Cut, 4> groups{};
  for (int g = 0; g < 4; ++g)
    for (int lane = 0; lane < 16; ++lane) {
      fetch_pair<K>(groups[g].bytes, lane, 32 * g + 2 * lane);
      for (int half = 0; half < 2; ++half)
        cut_state<K>(groups[g].cut, 2 * lane + half, lane, 32 * g + 2 * lane, half);
    }
  return groups;
}
template <int K>
constexpr auto kStateCuts = state_cuts<K>();

// The upper halves of the 32-bit lanes of a row: of its eight states in turn, bits 31..16 of the
// hash and bits 15..0, whose uppermost are the signs of u and v.
struct SignWords {
  alignas(64) uint16_t at[4][32]{};
  constexpr SignWords() {
    for (int row = 0; row < 4; ++row)
      for (int i = 0; i < 16; ++i)
        at[row][2 * i + 1] = static_cast<uint16_t>(8 * row + i / 2 + i % 2 * 32);
  }
};
constexpr SignWords kSignWords;

}  // namespace
}  // namespace rs

#include "avx512.h"
#include "trellis_states_avx512.h"

namespace rs {
namespace {

// States 32 * g to 32 * g + 31 of a tile, whose first four rows here are at dw.
template <int K>
RS_INLINE void hash_group(const TileBytes<K>& bytes, int g, const float* dw, int64_t stride,
                          Additions<uint16_t>& to) {
  const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  const __m512i states = _mm512_multishift_epi64_epi8(load(kStateCuts<K>[g].cut.at),
                                                      bytes.permute(kStateCuts<K>[g].bytes));
  __m512i high, low;
  hash(states, &high, &low);
  // Bits 14..5 of the high half are the point's number.
  _mm512_store_si512(to.offset,
                     _mm512_and_si512(_mm512_srli_epi16(high, 2), _mm512_set1_epi16(1023 * 8)));
#pragma GCC unroll 4
  for (int row = 0; row < 4; ++row) {
    const __m512i flips = _mm512_permutex2var_epi16(high, load(kSignWords.at[row]), low);
    const __m512i pairs = load(dw + row * stride);
    _mm512_store_si512(to.pair[8 * row], _mm512_ternarylogic_epi32(pairs, flips, sign, 0x78));
  }
}

// While one group's states are added, which waits for memory, the next group's are hashed.
template <int K>
void add_tiles(const Layer& layer, int64_t row0, int64_t row1, const float* dw, Histograms& sums) {
  Additions<uint16_t> turns[2] = {};
  const uint8_t* tile = layer.codes + row0 / 16 * layer.tile_cols() * 16 * K;
  for (int64_t row = row0; row < row1; row += 16, dw += 16 * layer.in)
    for (int64_t col = 0; col < layer.in; col += 16, tile += 16 * K) {
      const TileBytes<K> bytes(tile);
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) {
        hash_group<K>(bytes, g, dw + 4 * g * layer.in + col, layer.in, turns[g % 2]);
        add_group(turns[(g + 1) % 2], sums);
      }
    }
  add_group(turns[1], sums);
}

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {

void trellis_adjoint_avx512_slots(Row& row, int k) {
  with_trellis_bits(k, [&]<int K> { row.adjoint = histogram_adjoint<K, add_tiles<K>>; });
}

}  // namespace rs
#endif
