// Uniform codes decoded to float32 on AVX2, groups of a multiple of 8: every 32-bit lane gets the
// whole bytes of eight codes, or the two of them that hold its own, and shifts.
#include "fast.h"

#if RS_FAST_X86
#include "../codecs/uniform.h"

#include "lanes_avx2.h"

namespace rs {
namespace {

// For each lane, the two bytes of 64 bits that hold its code and the code's place in them; up to
// four bits, the place in 32.
template <int Bits>
struct EightCodes {
  alignas(32) uint8_t bytes[32]{};
  alignas(32) uint32_t shift[8]{};

  constexpr EightCodes() {
    for (int lane = 0; lane < 8; ++lane) {
      shift[lane] = static_cast<uint32_t>(Bits <= 4 ? Bits * lane : Bits * lane % 8);
      for (int t = 0; t < 4; ++t)
        bytes[4 * lane + t] = static_cast<uint8_t>(t < 2 ? Bits * lane / 8 + t : 0x80);
    }
  }
};
template <int Bits>
constexpr EightCodes<Bits> kEightCodes;

// Bytes that `unpack` reads; eight codes have Bits of them.
template <int Bits>
constexpr int kRead = Bits <= 2   ? 2
                      : Bits <= 4 ? 4
                                  : 8;

template <int Bits>
RS_INLINE __m256i unpack(const uint8_t* p) {
  const auto load = [](const auto* at) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(at));
  };
  const __m256i top = _mm256_set1_epi32((1 << Bits) - 1);
  if constexpr (Bits == 8) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  } else if constexpr (Bits > 4) {
    long long all;
    __builtin_memcpy(&all, p, 8);
    const __m256i pair =
        _mm256_shuffle_epi8(_mm256_set1_epi64x(all), load(kEightCodes<Bits>.bytes));
    return _mm256_and_si256(_mm256_srlv_epi32(pair, load(kEightCodes<Bits>.shift)), top);
  } else {
    uint32_t all = 0;
    __builtin_memcpy(&all, p, kRead<Bits>);
    const __m256i each = _mm256_set1_epi32(static_cast<int>(all));
    return _mm256_and_si256(_mm256_srlv_epi32(each, load(kEightCodes<Bits>.shift)), top);
  }
}

template <int Bits>
void decode_rows(const Layer& layer, bool symmetric, int64_t row0, int64_t row1, float* w) {
  constexpr int kStray = kRead<Bits> - Bits;
  const int64_t n = layer.tile_cols(), group = layer.tile.cols;
  const uint8_t* codes = layer.codes + row0 * n * layer.tile.bytes;
  const auto levels = [&](const uint8_t* p, __m256 zero, __m256 scale) RS_LAMBDA {
    return _mm256_mul_ps(_mm256_sub_ps(_mm256_cvtepi32_ps(unpack<Bits>(p)), zero), scale);
  };
  for (int64_t tile = row0 * n; tile < row1 * n; ++tile) {
    const __m256 scale = _mm256_set1_ps(layer.params[0][tile]);
    const __m256 zero = _mm256_set1_ps(symmetric ? 1 << (Bits - 1) : layer.params[1][tile]);
    // The last codes of the layer, behind which nothing may be read.
    const int64_t last = kStray && tile + 1 == layer.out * n ? 8 : 0;
    for (int64_t j = 0; j < group - last; j += 8, codes += Bits, w += 8)
      _mm256_storeu_ps(w, levels(codes, zero, scale));
    if (last) {
      uint8_t rest[8] = {};
      __builtin_memcpy(rest, codes, Bits);
      _mm256_storeu_ps(w, levels(rest, zero, scale));
    }
  }
}

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {

void uniform_decode_avx2_slots(Row& row, int bits, bool symmetric, int64_t group) {
  if (group % 8 != 0) return;
  with_uniform(bits, symmetric, [&]<int Bits, bool Symmetric> {
    row.decode = [](const Layer& layer, int64_t row0, int64_t row1, float* w) {
      decode_rows<Bits>(layer, Symmetric, row0, row1, w);
    };
  });
}

}  // namespace rs
#endif
