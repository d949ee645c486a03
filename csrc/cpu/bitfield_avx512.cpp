// Bitfield loops for AVX-512, whose processors all extract bits (BMI2) in one step.
#include "fast.h"

#if RS_FAST_X86
#include <immintrin.h>

#include <algorithm>
#include <vector>

#include "../codecs/bitfield.h"
#include "half.h"
#include "integers.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2")

#define RS_BMI2
#define RS_FMA
#include "bitfield_loops.h"

#pragma GCC pop_options

#include "bitfield_slots.h"

namespace rs {

void bitfield_avx512_slots(Row& row, int word, Amplitude amplitude) {
  fill_slots(row, word, amplitude);
}

}  // namespace rs
#endif
