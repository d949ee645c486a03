// Fast slots, chosen when a row is resolved. Each leaves alone what it has nothing for.
#pragma once

#include "../codec.h"
#include "isa.h"

namespace rs {

inline void trellis_fast_slots(Row&, int, Isa) {}
inline void uniform_fast_slots(Row&, int, bool, int64_t, Isa) {}

}  // namespace rs
