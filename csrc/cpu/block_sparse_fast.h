// Fast slots of block_sparse.
#pragma once

#include "fast.h"

namespace rs {

void block_sparse_avx2_slots(Row& row, bool square, bool mask16);
void block_sparse_avx512_slots(Row& row, bool square, bool mask16);

inline void block_sparse_fast_slots(Row& row, bool square, bool mask16, Isa isa) {
#if RS_FAST_X86
  if (isa >= Isa::avx2) block_sparse_avx2_slots(row, square, mask16);
  if (isa >= Isa::avx512) block_sparse_avx512_slots(row, square, mask16);
#endif
}

}  // namespace rs
