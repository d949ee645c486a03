// RS_CLONES: compile a function for several instruction sets, chosen when the library loads. Only
// for loops whose result does not depend on the vector width.
#pragma once

#include "inline.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(RS_SANITIZE)
#define RS_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define RS_CLONES
#endif
