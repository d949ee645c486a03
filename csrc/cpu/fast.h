// Fast slots by instruction set. Each file behind them may be deleted with its line here and its
// call in the codec: a slot left null falls back to the loops.
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
enum class PaletteLayout;

void bitfield_avx2_slots(Row& row, int word, Amplitude amplitude);
void bitfield_avx512_slots(Row& row, int word, Amplitude amplitude);
void cyclic_scalar_avx2_slots(Row& row, int bits, int64_t group);
void cyclic_scalar_avx512_slots(Row& row, int bits, int64_t group);
void hierarchical_avx2_slots(Row& row, bool exclusive_or);
void hierarchical_avx512_slots(Row& row, bool exclusive_or);
void palette_avx2_slots(Row& row, PaletteLayout layout, int bits, bool grouped);
void palette_avx512_slots(Row& row, PaletteLayout layout, int bits, bool grouped);
void trellis_avx2_slots(Row& row, int k);
void trellis_decode_avx2_slots(Row& row, int k);
void trellis_avx512_slots(Row& row, int k);
void trellis_adjoint_avx2_slots(Row& row, int k);
void trellis_adjoint_avx512_slots(Row& row, int k);
void ultra_avx2_slots(Row& row);
void ultra_avx512_slots(Row& row);
void uniform_avx2_slots(Row& row, int bits, bool symmetric, int64_t group);
void uniform_decode_avx2_slots(Row& row, int bits, bool symmetric, int64_t group);
void uniform_avx512_slots(Row& row, int bits, bool symmetric, int64_t group);
void uniform_adjoint_avx512_slots(Row& row, int bits, bool symmetric, int64_t group);
void vq_cyclic_avx2_slots(Row& row, int64_t block);
void vq_cyclic_avx512_slots(Row& row, int64_t block);

// These fill what an instruction set has; AVX-512 over AVX2.
inline void bitfield_fast_slots(Row& row, int word, Amplitude amplitude, Isa isa) {
#if RS_FAST_X86
  if (isa >= Isa::avx2) bitfield_avx2_slots(row, word, amplitude);
  if (isa >= Isa::avx512) bitfield_avx512_slots(row, word, amplitude);
#endif
}
inline void cyclic_scalar_fast_slots(Row& row, int bits, int64_t group, Isa isa) {
#if RS_FAST_X86
  if (isa >= Isa::avx2) cyclic_scalar_avx2_slots(row, bits, group);
  if (isa >= Isa::avx512) cyclic_scalar_avx512_slots(row, bits, group);
#endif
}
inline void hierarchical_fast_slots(Row& row, bool exclusive_or, Isa isa) {
#if RS_FAST_X86
  if (isa >= Isa::avx2) hierarchical_avx2_slots(row, exclusive_or);
  if (isa >= Isa::avx512) hierarchical_avx512_slots(row, exclusive_or);
#endif
}
inline void palette_fast_slots(Row& row, PaletteLayout layout, int bits, bool grouped, Isa isa) {
#if RS_FAST_X86
  if (isa >= Isa::avx2) palette_avx2_slots(row, layout, bits, grouped);
  if (isa >= Isa::avx512) palette_avx512_slots(row, layout, bits, grouped);
#endif
}
inline void trellis_fast_slots(Row& row, int k, Isa isa) {
#if RS_FAST_X86
  if (isa >= Isa::avx2) trellis_avx2_slots(row, k);
  if (isa >= Isa::avx2) trellis_decode_avx2_slots(row, k);
  if (isa >= Isa::avx2) trellis_adjoint_avx2_slots(row, k);
  if (isa >= Isa::avx512) trellis_avx512_slots(row, k);
  if (isa >= Isa::avx512) trellis_adjoint_avx512_slots(row, k);
#endif
}
inline void ultra_fast_slots(Row& row, Isa isa) {
#if RS_FAST_X86
  if (isa == Isa::avx2) ultra_avx2_slots(row);
  if (isa >= Isa::avx512) ultra_avx512_slots(row);
#endif
}
inline void uniform_fast_slots(Row& row, int bits, bool symmetric, int64_t group, Isa isa) {
#if RS_FAST_X86
  if (isa >= Isa::avx2) uniform_avx2_slots(row, bits, symmetric, group);
  if (isa >= Isa::avx2) uniform_decode_avx2_slots(row, bits, symmetric, group);
  if (isa >= Isa::avx512) uniform_avx512_slots(row, bits, symmetric, group);
  if (isa >= Isa::avx512) uniform_adjoint_avx512_slots(row, bits, symmetric, group);
#endif
}
inline void vq_cyclic_fast_slots(Row& row, int64_t block, Isa isa) {
#if RS_FAST_X86
  if (isa == Isa::avx2) vq_cyclic_avx2_slots(row, block);
  if (isa >= Isa::avx512) vq_cyclic_avx512_slots(row, block);
#endif
}

}  // namespace rs
