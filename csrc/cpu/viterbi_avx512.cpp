// The trellis search on AVX-512: 32 lanes.
#include "viterbi_pass.h"

#ifdef __x86_64__
#include <immintrin.h>

#include <cstring>

// GCC 12 sees uninitialised variables in its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2")

namespace rs::viterbi {
namespace {

struct Avx512 {
  using V = __m512i;
  static constexpr int kLanes = 32, kGroup = 4;

  static V load(const int16_t* p) { return _mm512_loadu_si512(p); }
  static V fill(int x) { return _mm512_set1_epi16(static_cast<int16_t>(x)); }
  static V add(V x, V y) { return _mm512_add_epi16(x, y); }
  static V sub(V x, V y) { return _mm512_sub_epi16(x, y); }
  static V saturating_sub(V x, V y) { return _mm512_subs_epi16(x, y); }
  static V min(V x, V y) { return _mm512_min_epi16(x, y); }
  static V mulhrs(V x, V y) { return _mm512_mulhrs_epi16(x, y); }
  static V dot_bytes(V u8, V s8) { return _mm512_maddubs_epi16(u8, s8); }
  static V swap(V x) { return _mm512_rol_epi32(x, 16); }

  template <int N>
  static V spread(const int16_t* p) {
    if constexpr (N == 2) {
      int32_t pair;
      std::memcpy(&pair, p, sizeof pair);
      return _mm512_set1_epi32(pair);
    } else {
      int64_t four;
      std::memcpy(&four, p, sizeof four);
      return _mm512_set1_epi64(four);
    }
  }
  // Lane l goes to p[l % N * stride + l / N].
  template <int N>
  static void store(int16_t* p, int stride, V x) {
    alignas(64) static constexpr auto kOrder = [] {
      struct {
        int16_t lane[32];
      } order{};
      for (int l = 0; l < 32; ++l) order.lane[l % N * (32 / N) + l / N] = static_cast<int16_t>(l);
      return order;
    }();
    x = _mm512_permutexvar_epi16(_mm512_load_si512(kOrder.lane), x);
    if constexpr (N == 4) {
      _mm512_storeu_si512(p, x);  // stride is 8
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(x));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + stride), _mm512_extracti64x4_epi64(x, 1));
    }
  }
  static int lowest(V x) {
    const __m256i y = _mm256_min_epi16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    const __m128i z = _mm_min_epi16(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    const __m128i bias = _mm_set1_epi16(kBottom);  // minpos is unsigned
    return static_cast<uint16_t>(_mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(z, bias)), 0)) +
           kBottom;
  }
};

#include "viterbi_kernel.h"

}  // namespace

const KernelTable& avx512_kernels() { return kTable<Avx512>; }

}  // namespace rs::viterbi

#pragma GCC pop_options
#else
namespace rs::viterbi {
const KernelTable& avx512_kernels() { return generic_kernels(); }
}  // namespace rs::viterbi
#endif
