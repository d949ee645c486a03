// Inlined into the caller whatever the length, and so compiled for its instruction set: a function,
// and a lambda (before its body). Templates have no target of their own.
#pragma once

#define RS_INLINE __attribute__((always_inline)) inline
#define RS_LAMBDA __attribute__((always_inline))
