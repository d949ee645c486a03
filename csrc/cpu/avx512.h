// Switches this file to AVX-512 up to its `#pragma GCC pop_options`; what the kernels share.
// Everything from here on is internal to the file: nothing compiled for these instructions may be
// linked in place of the same function compiled without, so no header of the library comes later.
#pragma once

#include <immintrin.h>

#include "inline.h"
#include "integers.h"

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 warns inside its own intrinsics
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,avx2,fma")

namespace rs {
namespace {

RS_INLINE __m512i load(const void* p) { return _mm512_loadu_si512(p); }

// acc + the products of four unsigned with four signed bytes. Of the intrinsic gcc 12 copies acc,
// and keeps half of a block's sums in memory.
RS_INLINE void add_products(__m512i& acc, __m512i codes, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(x));
}

// Adds half an ulp of bfloat16, to even: the upper 16 bits of a lane are the rounded number. A NaN
// of all ones would become zero: tables and scales hold quiet ones.
RS_INLINE __m512i round_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
}

}  // namespace
}  // namespace rs
