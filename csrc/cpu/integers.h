// What the integer kernels of all instruction sets share: aligned arrays and activations in int16.
// Plain C++: this header is included before any `#pragma GCC target`.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>

namespace rs {

// n elements on a cache line, set to zero.
template <class T>
class Lines {
 public:
  explicit Lines(int64_t n)
      : data_(static_cast<T*>(
            ::operator new(sizeof(T) * static_cast<size_t>(n) + 64, std::align_val_t{64}))) {
    std::fill_n(data_.get(), n, T{});
  }
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* data) const { ::operator delete(data, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Free> data_;
};

struct alignas(64) Bytes {
  uint8_t at[64];
};

// How n floats become integers of at most `top` in magnitude: q = round(x * inverse), x ~ q * unit.
// A NaN or an infinity makes unit NaN, so that it reaches every output it would reach in floats.
struct Quantum {
  float unit, inverse;

  Quantum(const float* x, int64_t n, int top) : Quantum(peak_of(x, n), top) {}
  // Magnitudes order like their bits, with NaN above infinity.
  Quantum(uint32_t peak_bits, int top) {
    const float peak = std::bit_cast<float>(peak_bits);
    const bool finite = peak_bits < 0x7F800000u;
    const bool zero = finite && peak < 1e-30f;  // below, the inverse would overflow
    unit = !finite ? std::numeric_limits<float>::quiet_NaN() : zero ? 0.0f : peak / top;
    inverse = !finite || zero ? 0.0f : top / peak;
  }
  static uint32_t peak_of(const float* x, int64_t n) {
    uint32_t bits = 0;
    for (int64_t i = 0; i < n; ++i)
      bits = std::max(bits, std::bit_cast<uint32_t>(x[i]) & 0x7FFFFFFFu);
    return bits;
  }

  // Rounds by adding 1.5 * 2^23, whose low sixteen bits are zero: plain SSE2 vectorises it.
  int16_t operator()(float x) const {
    return static_cast<int16_t>(std::bit_cast<uint32_t>(x * inverse + 12582912.0f));
  }
};

// The NaN whose bits survive rounding to bfloat16.
inline float quiet(float x) { return std::isnan(x) ? std::numeric_limits<float>::quiet_NaN() : x; }

constexpr int kMaxBatch = 8;  // rows of x a kernel takes at once

// Parallel ranges of rows get at least this many weights, below which a thread costs more than it
// does.
constexpr int64_t kWeightsPerThread = 1 << 16;
inline int64_t row_grain(int64_t rows, int64_t weights_per_row) {
  return std::clamp<int64_t>(kWeightsPerThread / std::max<int64_t>(weights_per_row, 1), 1,
                             std::max<int64_t>(rows, 1));
}

}  // namespace rs
