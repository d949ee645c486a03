// Bitfield loops for AVX2. Without BMI2: some processors extract bits in microcode.
#include "fast.h"

#if RS_FAST_X86
#include <immintrin.h>

#include <algorithm>
#include <vector>

#include "../codecs/bitfield.h"
#include "half.h"
#include "integers.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma")

#define RS_FMA
#include "bitfield_loops.h"

#pragma GCC pop_options

#include "bitfield_slots.h"

namespace rs {

void bitfield_avx2_slots(Row& row, int word, Amplitude amplitude) {
  fill_slots(row, word, amplitude);
}

}  // namespace rs
#endif
