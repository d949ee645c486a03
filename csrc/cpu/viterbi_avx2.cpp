// The trellis search on AVX2: 16 lanes.
#include "viterbi_pass.h"

#ifdef __x86_64__
#include <immintrin.h>

#include <cstring>

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")

namespace rs::viterbi {
namespace {

struct Avx2 {
  using V = __m256i;
  static constexpr int kLanes = 16, kGroup = 2;

  static V load(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const V*>(p)); }
  static V fill(int x) { return _mm256_set1_epi16(static_cast<int16_t>(x)); }
  static V add(V x, V y) { return _mm256_add_epi16(x, y); }
  static V sub(V x, V y) { return _mm256_sub_epi16(x, y); }
  static V saturating_sub(V x, V y) { return _mm256_subs_epi16(x, y); }
  static V min(V x, V y) { return _mm256_min_epi16(x, y); }
  static V mulhrs(V x, V y) { return _mm256_mulhrs_epi16(x, y); }
  static V dot_bytes(V u8, V s8) { return _mm256_maddubs_epi16(u8, s8); }
  static V swap(V x) { return _mm256_or_si256(_mm256_slli_epi32(x, 16), _mm256_srli_epi32(x, 16)); }

  template <int N>
  static V spread(const int16_t* p) {
    if constexpr (N == 2) {
      int32_t pair;
      std::memcpy(&pair, p, sizeof pair);
      return _mm256_set1_epi32(pair);
    } else {
      int64_t four;
      std::memcpy(&four, p, sizeof four);
      return _mm256_set1_epi64x(four);
    }
  }
  // Lane l goes to p[l % N * stride + l / N].
  template <int N>
  static void store(int16_t* p, int stride, V x) {
    if constexpr (N == 2) {
      const V order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,  //
                                       0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
      x = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(x, order), 0xD8);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(x));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + stride), _mm256_extracti128_si256(x, 1));
    } else {
      const V order = _mm256_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15,  //
                                       0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
      x = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(x, order),
                                      _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
      const __m128i two[2] = {_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)};
      for (int i = 0; i < 2; ++i) {
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p + 2 * i * stride), two[i]);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p + (2 * i + 1) * stride),
                         _mm_unpackhi_epi64(two[i], two[i]));
      }
    }
  }
  static int lowest(V x) {
    const __m128i y = _mm_min_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    const __m128i bias = _mm_set1_epi16(static_cast<int16_t>(kBottom));  // minpos is unsigned
    return _mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(y, bias)), 0) + kBottom;
  }
};

#include "viterbi_kernel.h"

}  // namespace

const KernelTable& avx2_kernels() { return kTable<Avx2>; }

}  // namespace rs::viterbi

#pragma GCC pop_options
#else
namespace rs::viterbi {
const KernelTable& avx2_kernels() { return generic_kernels(); }
}  // namespace rs::viterbi
#endif
