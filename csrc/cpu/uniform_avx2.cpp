// Uniform codes of 2, 4 and 8 bits on AVX2, groups of a multiple of 32: shifted and masked to
// int16, as on AVX-512. A step is half a block of the activations, 32 bytes of codes.
#include "fast.h"

#if RS_FAST_X86
#include <cstring>

#include "parallel.h"
#include "uniform_integers.h"

#include "lanes_avx2.h"

namespace rs {
namespace {

struct Product {
  const Layer& layer;
  const UniformGroups& groups;
  const UniformActivations& x;
  bool symmetric;
  int64_t m;
  float* repeated;  // kRows rows of scales, when each stands for more than one group
  float* y;
};

// Rows at a time: their blocks meet the same activations while those are in the first cache.
template <int B>
constexpr int kRows = B == 1 ? 1 : 4;

// Of half a block; all scales behind s are there to read but in the last step of a row.
template <int PerStep>
RS_INLINE __m256 lane_scales(const float* s, __m256i lane) {
  if constexpr (PerStep == 2) {
    double two;
    __builtin_memcpy(&two, s, sizeof two);
    return _mm256_permutevar8x32_ps(_mm256_castpd_ps(_mm256_set1_pd(two)), lane);
  }
  if constexpr (PerStep == 4)
    return _mm256_permutevar8x32_ps(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(s)), lane);
  return _mm256_set1_ps(*s);
}

template <int Bits, int B>
RS_INLINE void add_step(const uint8_t* codes, const int16_t* values, __m256i* acc) {
  constexpr int kParts = 16 / Bits;
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  const __m256i top = _mm256_set1_epi16((1 << Bits) - 1);
  for (int k = 0; k < kParts; ++k) {
    __m256i w = _mm256_srli_epi16(bytes, k * Bits);
    if (k + 1 < kParts) w = _mm256_and_si256(w, top);
    for (int b = 0; b < B; ++b) {
      const __m256i x =
          _mm256_load_si256(reinterpret_cast<const __m256i*>(values + (b * kParts + k) * 32));
      acc[b] = _mm256_add_epi32(acc[b], _mm256_madd_epi16(w, x));
    }
  }
}

template <int B>
RS_INLINE void flush(const __m256i* acc, __m256 scales, __m256* total) {
  for (int b = 0; b < B; ++b)
    total[b] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[b]), scales, total[b]);
}

// Rows row, row + 1, ... below `end`, of which the last fills up the kRows.
// PerStep scales meet half a block, or, when it is 0, one scale meets groups.span halves.
template <int Bits, int B, int PerStep>
void rows(const Product& p, int64_t row, int64_t end) {
  constexpr int R = kRows<B>, kBlock = 16 / Bits * 32 * B;
  constexpr int kRowsAhead =
      8;  // of scales and zeros, which are too short for the hardware to foresee
  const auto& [layer, groups, x, symmetric, m, repeated, y] = p;
  const int64_t n = layer.tile_cols(), row_bytes = n * layer.tile.bytes;
  const int64_t ahead = R == 1 ? 4096 : R * row_bytes;  // bytes of software prefetch
  const int64_t full = row_bytes / 32, scales = n * groups.repeat;
  int64_t at[R];
  const uint8_t* codes[R];
  const float* s[R];
  __m256 total[R][B];
  for (int r = 0; r < R; ++r) {
    at[r] = row + r < end ? row + r : end - 1;
    codes[r] = layer.codes + at[r] * row_bytes;
    s[r] = layer.params[0] + at[r] * n;
    if (groups.repeat > 1) {
      float* to = repeated + r * scales;
      for (int64_t g = 0; g < n; ++g)
        for (int64_t i = 0; i < groups.repeat; ++i) *to++ = s[r][g];
      s[r] = to - scales;
    }
    for (int b = 0; b < B; ++b) total[r][b] = _mm256_setzero_ps();
  }

  const __m256i lane = _mm256_load_si256(reinterpret_cast<const __m256i*>(groups.lane));
  const auto values = [&](int64_t step) {
    return x.values.get() + step / 2 * kBlock + step % 2 * 16;
  };
  const int64_t span = PerStep ? 1 : groups.span;
  for (int64_t step = 0; step < full; step += span) {
#pragma GCC unroll 1
    for (int r = 0; r < R; ++r) {
      __m256i acc[B];
      for (int b = 0; b < B; ++b) acc[b] = _mm256_setzero_si256();
      for (int64_t i = 0; i < span; ++i) {
        _mm_prefetch(codes[r] + ahead, _MM_HINT_T0);
        add_step<Bits, B>(codes[r], values(step + i), acc);
        codes[r] += 32;
      }
      flush<B>(acc, lane_scales<PerStep>(s[r], lane), total[r]);
      s[r] += PerStep ? PerStep : 1;
    }
  }
  if (full * 32 < row_bytes) {
    for (int r = 0; r < R; ++r) {
      uint8_t rest[32] = {};
      float last[8] = {};
      __builtin_memcpy(rest, codes[r], static_cast<size_t>(row_bytes - full * 32));
      __builtin_memcpy(last, s[r], sizeof(float) * static_cast<size_t>(scales % groups.per_block));
      __m256i acc[B];
      for (int b = 0; b < B; ++b) acc[b] = _mm256_setzero_si256();
      add_step<Bits, B>(rest, values(full), acc);
      flush<B>(acc, _mm256_permutevar8x32_ps(_mm256_loadu_ps(last), lane), total[r]);
    }
  }

#pragma GCC unroll 1
  for (int r = 0; r < R; ++r) {
    const float* scale = layer.params[0] + at[r] * n;
    const float* zero = symmetric ? nullptr : layer.params[1] + at[r] * n;
    const __m256 middle = _mm256_set1_ps(1 << (Bits - 1));
    float rest[B] = {};
    for (int64_t g = 0; g < n; g += 8) {
      _mm_prefetch(scale + g + kRowsAhead * n, _MM_HINT_T0);
      if (zero) _mm_prefetch(zero + g + kRowsAhead * n, _MM_HINT_T0);
      if (g + 8 <= n) {
        const __m256 z = zero ? _mm256_loadu_ps(zero + g) : middle;
        const __m256 offset = _mm256_mul_ps(_mm256_loadu_ps(scale + g), z);
        for (int b = 0; b < B; ++b)
          total[r][b] = _mm256_fnmadd_ps(offset, _mm256_load_ps(x.sums.get() + b * x.groups + g),
                                         total[r][b]);
      } else {
        for (int64_t i = g; i < n; ++i)
          for (int b = 0; b < B; ++b)
            rest[b] += scale[i] * (zero ? zero[i] : 1 << (Bits - 1)) * x.sums[b * x.groups + i];
      }
    }
    for (int b = 0; b < B; ++b)
      if (b < m) y[b * layer.out + at[r]] = (sum_lanes(total[r][b]) - rest[b]) * x.unit[b];
  }
}

template <int Bits, int B>
void product(const Product& p, int64_t row0, int64_t row1) {
  const auto run = p.groups.span > 1         ? rows<Bits, B, 0>
                   : p.groups.per_block == 1 ? rows<Bits, B, 1>
                                             : p.groups.per_block == 2 ? rows < Bits,
             B, Bits == 8 ? 1 : 2 > : rows < Bits, B, Bits == 2 ? 4 : 1 > ;
  for (; row0 < row1; row0 += kRows<B>) run(p, row0, row1);
}

}  // namespace
}  // namespace rs

#pragma GCC pop_options

namespace rs {
namespace {

template <int Bits, bool Symmetric>
void linear(const Layer& layer, const float* x, int64_t m, float* y) {
  const UniformGroups groups(layer.tile.cols, Bits, 256);
  const int64_t grain = row_grain(layer.out, layer.in);
  for (int64_t b = 0; b < m; b += kMaxBatch) {
    const int64_t batch = std::min<int64_t>(kMaxBatch, m - b);
    const UniformActivations values(x + b * layer.in, batch, layer.in, Bits, layer.tile.cols);
    const auto kernel = values.batch == 1   ? product<Bits, 1>
                        : values.batch == 2 ? product<Bits, 2>
                        : values.batch == 4 ? product<Bits, 4>
                                            : product<Bits, 8>;
    parallel_for(layer.out, grain, [&](int64_t begin, int64_t end) {
      const Lines<float> repeated(groups.repeat > 1 ? kRows<kMaxBatch> * layer.in / groups.group
                                                    : 0);
      kernel({layer, groups, values, Symmetric, batch, repeated.get(), y + b * layer.out}, begin,
             end);
    });
  }
}

}  // namespace

void uniform_avx2_slots(Row& row, int bits, bool symmetric, int64_t group) {
  if (group % 32 != 0) return;
  with_uniform(bits, symmetric, [&]<int Bits, bool Symmetric> {
    if constexpr (16 % Bits == 0) {
      row.linear = linear<Bits, Symmetric>;
      row.linear_max_m = 3 * kMaxBatch;  // then panels are about as fast
      row.linear_type = "integer codes, 16-bit activations per row";
    }
  });
}

}  // namespace rs
#endif
