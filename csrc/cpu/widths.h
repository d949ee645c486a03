// Loops over vectors of floats as wide as the instruction set's registers. A wider vector than that
// would be taken apart through memory, at a tenth of the speed.
#pragma once

#include <cstdint>

#include "clones.h"
#include "fast.h"

namespace rs {

template <class T, int L>
struct Vector {
  typedef T type __attribute__((vector_size(sizeof(T) * L)));
  // In place: no vector is returned by value, which would need one ABI for all.
  typedef T stored __attribute__((vector_size(sizeof(T) * L), aligned(sizeof(T)), may_alias));
};
template <class T, int L>
using VectorOf = typename Vector<T, L>::type;
template <class T, int L>
RS_INLINE const typename Vector<T, L>::stored& at(const T* p) {
  return *reinterpret_cast<const typename Vector<T, L>::stored*>(p);
}
template <class T, int L>
RS_INLINE typename Vector<T, L>::stored& at(T* p) {
  return *reinterpret_cast<typename Vector<T, L>::stored*>(p);
}

// N values of T in registers of L floats.
template <class T, int N, int L>
struct Wide {
  static constexpr int kLanes = L * static_cast<int>(sizeof(float)) / static_cast<int>(sizeof(T)),
                       kCount = N / kLanes;
  VectorOf<T, kLanes> v[kCount];

  // Vector by vector: copied as bytes, they would go through memory in other sizes, which waits.
  RS_INLINE void load(const T* from) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) v[i] = at<T, kLanes>(from + i * kLanes);
  }
  RS_INLINE void store(T* to) const {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) at<T, kLanes>(to + i * kLanes) = v[i];
  }
  RS_INLINE void operator+=(const Wide& other) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) v[i] += other.v[i];
  }
  RS_INLINE void operator*=(const Wide& other) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) v[i] *= other.v[i];
  }
  RS_INLINE void operator*=(T factor) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) v[i] *= factor;
  }
  // += a * factor, in two roundings.
  RS_INLINE void add(const Wide& a, T factor) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) v[i] += a.v[i] * factor;
  }
};

// Of sixteen partial sums, by halves.
RS_INLINE float sum_lanes(const void* sixteen) {
  float lanes[16];
  __builtin_memcpy(lanes, sixteen, sizeof lanes);
  for (int half = 8; half; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

namespace widths {
#if RS_FAST_X86
template <class Body>
__attribute__((target("avx512f"))) void call16(Body& body) {
  body.template operator()<16>();
}
template <class Body>
__attribute__((target("avx2,fma"))) void call8(Body& body) {
  body.template operator()<8>();
}
#endif
}  // namespace widths

// Calls body<L>() compiled for vectors of L floats: 16 on AVX-512, 8 on AVX2, else 4. The body must
// be RS_LAMBDA, and give the same bits at any width.
template <class Body>
void by_width(Body&& body) {
#if RS_FAST_X86
  if (current_isa() >= Isa::avx512) return widths::call16(body);
  if (current_isa() >= Isa::avx2) return widths::call8(body);
#endif
  body.template operator()<4>();
}

}  // namespace rs
