// Fast slots by instruction set. Each file behind them may be deleted with its line here: a slot
// left null falls back to the loops.
#pragma once

#include "../codec.h"
#include "isa.h"

// gcc only: it switches instruction sets by `#pragma GCC target`, which clang ignores.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RS_FAST_X86 1
#else
#define RS_FAST_X86 0
#endif

namespace rs {

enum class Amplitude;

void bitfield_avx2_slots(Row& row, int word, Amplitude amplitude);
void bitfield_avx512_slots(Row& row, int word, Amplitude amplitude);
void trellis_avx2_slots(Row& row, int k);
void trellis_avx512_slots(Row& row, int k);
void uniform_avx2_slots(Row& row, int bits, bool symmetric, int64_t group);
void uniform_avx512_slots(Row& row, int bits, bool symmetric, int64_t group);

// Fills the fast slots of a resolved row for this instruction set; leaves what it has nothing for.
// k = 2 * bits, 3 to 8.
inline void trellis_fast_slots(Row& row, int k, Isa isa) {
#if RS_FAST_X86
  if (isa >= Isa::avx2) trellis_avx2_slots(row, k);
  if (isa >= Isa::avx512) trellis_avx512_slots(row, k);
#endif
}

inline void bitfield_fast_slots(Row& row, int word, Amplitude amplitude, Isa isa) {
#if RS_FAST_X86
  if (isa == Isa::avx2) bitfield_avx2_slots(row, word, amplitude);
  if (isa == Isa::avx512) bitfield_avx512_slots(row, word, amplitude);
#endif
}

inline void uniform_fast_slots(Row& row, int bits, bool symmetric, int64_t group, Isa isa) {
#if RS_FAST_X86
  if (isa >= Isa::avx2) uniform_avx2_slots(row, bits, symmetric, group);
  if (isa >= Isa::avx512) uniform_avx512_slots(row, bits, symmetric, group);
#endif
}

}  // namespace rs
