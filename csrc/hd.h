// Helpers that compile for host and device alike. No torch header, no library functions: every
// float here is the result of IEEE operations in a fixed order, so all devices agree bit for bit.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define RS_HD __host__ __device__ __forceinline__
// A table of constants that such helpers index; in a .cu file their host halves are never called.
#define RS_TABLE [[maybe_unused]] static __device__ constexpr
#pragma nv_diag_suppress 20091
#else
#define RS_HD inline
#define RS_TABLE inline constexpr
#endif

namespace rs {

// One correctly rounded product or sum, never fused into a multiply-add.
// (On the host -ffp-contract=off does the same.)
RS_HD float mul(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
RS_HD float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
RS_HD double mul(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}
RS_HD double add(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

// Bits (at most 8) bits starting at bit `at`, least significant first. Touches only the bytes that
// hold the field, so the last field of a buffer is safe to read.
template <int Bits>
RS_HD uint32_t read_bits(const uint8_t* bytes, int64_t at) {
  static_assert(Bits >= 1 && Bits <= 8);
  const int64_t byte = at >> 3;
  const int shift = static_cast<int>(at & 7);
  uint32_t word = bytes[byte];
  if (shift + Bits > 8) word |= static_cast<uint32_t>(bytes[byte + 1]) << 8;
  return (word >> shift) & ((1u << Bits) - 1);
}

template <int Bits>
RS_HD void write_bits(uint8_t* bytes, int64_t at, uint32_t value) {
  static_assert(Bits >= 1 && Bits <= 8);
  const int64_t byte = at >> 3;
  const int shift = static_cast<int>(at & 7);
  bytes[byte] = static_cast<uint8_t>(bytes[byte] | (value << shift));
  if (shift + Bits > 8)
    bytes[byte + 1] = static_cast<uint8_t>(bytes[byte + 1] | (value >> (8 - shift)));
}

}  // namespace rs
