// Decode and direct product of bitfield codes, plain C++: each file that includes this compiles it
// for its own instruction set, after its `#pragma GCC target` if it has one. With RS_BMI2 and
// RS_FMA it uses those.
//
// Product: of one row of x with blocks of up to 8 weights, code by code; else dots[code][index][b]
// = <x_b, basis[index]> once per block of x, then each code costs a table entry, a dot and a
// multiply-add, all float32. Dots of a strip of codes stay in the first cache while a group of rows
// passes; the table mostly hits the second.
#pragma once

#include "../codecs/bitfield.h"
#include "clones.h"
#include "half.h"
#include "integers.h"

namespace rs {
namespace {

// Rows that share a pass over the dots, which come from the second cache or beyond.
template <int B>
constexpr int kRowGroup = std::max(256, 128 * B);
constexpr int kRowsAhead = 16;  // of software prefetch: strips of rows are no stream

template <class Codec>
struct Unpacked {
  uint64_t entry[Codec::kCodes];
  uint32_t index[Codec::kCodes];
  uint32_t phase;
};

// The bits of `mask`, whose two runs are 10 and 4 bits long (or 12 and 4), side by side.
template <uint64_t mask, int low, int gap>
RS_INLINE uint64_t extract(uint64_t word) {
#if defined(RS_BMI2)
  return _pext_u64(word, mask);
#else
  constexpr int shift = std::countr_zero(mask);
  constexpr uint64_t ones = (uint64_t{1} << low) - 1;
  return (word >> (shift + gap) & 15u << low) | (word >> shift & ones);
#endif
}

// sum += a * b, of floats or vectors.
RS_INLINE void add_product(float& sum, float a, float b) {
#if defined(RS_FMA)
  sum = __builtin_fmaf(a, b, sum);
#else
  sum += a * b;
#endif
}
template <class V>
RS_INLINE void add_product(V& sum, V a, V b) {
#if defined(RS_FMA)
  if constexpr (sizeof(V) == 16)
    sum = _mm_fmadd_ps(a, b, sum);
  else
    sum = _mm256_fmadd_ps(a, b, sum);
#else
  sum += a * b;
#endif
}

template <class Codec>
RS_INLINE Unpacked<Codec> unpack(const uint8_t* tile) {
  Unpacked<Codec> u;
  if constexpr (Codec::kCodes == 4) {
    uint64_t low, high;  // codes 0 and 1, codes 2 and 3
    std::memcpy(&low, tile, 8);
    std::memcpy(&high, tile + 3, 8);
    high >>= 20;
    constexpr uint64_t mask = 0x3C03FF;
    u.entry[0] = extract<mask, 10, 8>(low);
    u.entry[1] = extract<mask << 22, 10, 8>(low);
    u.entry[2] = extract<mask, 10, 8>(high);
    u.entry[3] = extract<mask << 22, 10, 8>(high);
    u.index[0] = low >> 10 & 255;
    u.index[1] = low >> 32 & 255;
    u.index[2] = high >> 10 & 255;
    u.index[3] = high >> 32 & 255;
    u.phase = 0;
  } else {
    uint32_t word;
    std::memcpy(&word, tile, 4);
    u.entry[0] = extract<0xF00FFF, 12, 8>(word);
    u.index[0] = word >> 12 & 255;
    u.phase = word >> 24;
  }
  return u;
}

template <class Codec>
RS_INLINE float factor(const uint8_t* tile, const Unpacked<Codec>& u, int k, const float* table,
                       const float* cosine) {
  if constexpr (Codec::kWidth)
    return Codec::interpolate(Codec::stored_fraction(tile, k), static_cast<uint32_t>(u.entry[k]),
                              table);
  if constexpr (Codec::kCodes == 1) return mul(table[u.entry[k]], cosine[u.phase]);
  return table[u.entry[k]];
}

RS_INLINE void put_weight(float* w, float value) { *w = value; }
RS_INLINE void put_weight(uint16_t* w, float value) { *w = to_bf16(value); }

template <class Codec, int Block, class T>
void decode_blocks(const Layer& layer, const typename Codec::Tables& tables, int64_t row0,
                   int64_t row1, T* w) {
  const float *table = tables.value, *cosine = tables.cosine, *basis = tables.basis;
  const uint8_t* tile = layer.codes + row0 * layer.tile_cols() * Codec::kBytes;
  const uint8_t* end = layer.codes + row1 * layer.tile_cols() * Codec::kBytes;
  for (; tile < end; tile += Codec::kBytes) {
    const Unpacked<Codec> u = unpack<Codec>(tile);
    for (int k = 0; k < Codec::kCodes; ++k, w += Block) {
      const float f = factor<Codec>(tile, u, k, table, cosine);
      const float* b = basis + u.index[k] * Block;
      for (int j = 0; j < Block; ++j) put_weight(w + j, mul(f, b[j]));
    }
  }
}

// The dots of B rows of x, side by side.
template <int B>
struct Side {
  typedef float Vector __attribute__((vector_size(4 * B)));
  typedef float Stored __attribute__((vector_size(4 * B), aligned(4), may_alias));
};

template <>
struct Side<1> {
  using Vector = float;
  using Stored = float;
};

// sums[b] += the products of n tiles with their dots.
template <class Codec, int B>
RS_INLINE void add_strip(const uint8_t* tile, int64_t n, const float* table, const float* cosine,
                         const float* dot, float* sums) {
  constexpr int kLanes = B == 1 ? 4 : 2;
  using Vector = typename Side<B>::Vector;
  using Stored = typename Side<B>::Stored;
  Vector lanes[kLanes] = {};
#pragma GCC unroll 16
  for (int64_t t = 0; t < n; ++t, tile += Codec::kBytes, dot += Codec::kCodes * kBasis * B) {
    const Unpacked<Codec> u = unpack<Codec>(tile);
    for (int k = 0; k < Codec::kCodes; ++k) {
      const float f = factor<Codec>(tile, u, k, table, cosine);
      const float* d = dot + (k * kBasis + u.index[k]) * B;
      Vector& lane = lanes[(t * Codec::kCodes + k) % kLanes];
      if constexpr (B == 1)
        add_product(lane, f, *d);
      else
        lane += f * *reinterpret_cast<const Stored*>(d);
    }
  }
  for (int i = 1; i < kLanes; ++i) lanes[0] += lanes[i];
  *reinterpret_cast<Stored*>(sums) += lanes[0];
}

// y[r] for rows [row0, row1) of one row of x, without dots: short blocks take about as many
// operations so, and leave the first cache to the table.
template <class Codec, int Block>
void multiply_one(const Layer& layer, const typename Codec::Tables& tables, const float* x,
                  int64_t row0, int64_t row1, float* y) {
  constexpr int kTiles = 4 / Codec::kCodes, kAhead = 2048;  // bytes of software prefetch
  using Vector = typename Side<Block>::Vector;
  using Stored = typename Side<Block>::Stored;
  const float *table = tables.value, *cosine = tables.cosine, *basis = tables.basis;
  const int64_t tiles = layer.tile_cols();
  const uint8_t* tile = layer.codes + row0 * tiles * Codec::kBytes;
  for (int64_t row = row0; row < row1; ++row) {
    Vector sums[4] = {};  // independent, so that additions need not wait
    const float* from = x;
    const auto add_tile = [&](int i) RS_LAMBDA {
      const Unpacked<Codec> u = unpack<Codec>(tile);
#pragma GCC unroll 4
      for (int k = 0; k < Codec::kCodes; ++k, from += Block) {
        const Vector f = factor<Codec>(tile, u, k, table, cosine) - Vector{};
        const Vector b = *reinterpret_cast<const Stored*>(basis + u.index[k] * Block);
        add_product(sums[(i + k) % 4], f, b * *reinterpret_cast<const Stored*>(from));
      }
      tile += Codec::kBytes;
    };
    int64_t t = 0;
    for (; t + kTiles <= tiles; t += kTiles) {
      __builtin_prefetch(tile + kAhead);
#pragma GCC unroll 4
      for (int i = 0; i < kTiles; ++i) add_tile(i);
    }
    for (; t < tiles; ++t) add_tile(0);
    const Vector sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    float total = 0;
    for (int i = 0; i < Block; ++i) total += sum[i];
    y[row] = total;
  }
}

// y[b * out + r] for rows [row0, row1) and b < m, from the dots of B >= m rows of x.
template <class Codec, int B>
void multiply_rows(const Layer& layer, const typename Codec::Tables& tables, const float* dots,
                   int64_t row0, int64_t row1, int64_t m, float* y) {
  constexpr int kCodes = Codec::kCodes;
  constexpr int64_t kStrip = std::max(4, 16 / B) / kCodes;  // tiles
  const float *table = tables.value, *cosine = tables.cosine;
  const int64_t tiles = layer.tile_cols(), row_bytes = tiles * Codec::kBytes;
  for (int64_t group = row0; group < row1; group += kRowGroup<B>) {
    const int64_t rows = std::min<int64_t>(kRowGroup<B>, row1 - group);
    float sums[kRowGroup<B>][B] = {};
    for (int64_t strip = 0; strip < tiles; strip += kStrip) {
      const uint8_t* tile = layer.codes + group * row_bytes + strip * Codec::kBytes;
      const float* dot = dots + strip * kCodes * kBasis * B;
      const bool whole = strip + kStrip <= tiles;
      for (int64_t r = 0; r < rows; ++r, tile += row_bytes) {
        const uint8_t* ahead = tile + kRowsAhead * row_bytes;
        __builtin_prefetch(ahead);
        __builtin_prefetch(ahead + kStrip * Codec::kBytes - 1);
        // The usual length is a constant, so that the compiler unrolls.
        if (whole)
          add_strip<Codec, B>(tile, kStrip, table, cosine, dot, sums[r]);
        else
          add_strip<Codec, B>(tile, tiles - strip, table, cosine, dot, sums[r]);
      }
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t b = 0; b < m; ++b) y[b * layer.out + group + r] = sums[r][b];
  }
}

// dots of codes [code0, code1) with one row of x; the basis is turned to (block, 256).
RS_INLINE void fill_dots_of_one(const float* x, const float* turned, int64_t block, int64_t code0,
                                int64_t code1, float* dots) {
  for (int64_t c = code0; c < code1; ++c) {
    float sums[kBasis] = {};
    for (int64_t j = 0; j < block; ++j)
      for (int k = 0; k < kBasis; ++k)
        add_product(sums[k], x[c * block + j], turned[j * kBasis + k]);
    for (int k = 0; k < kBasis; ++k) dots[c * kBasis + k] = sums[k];
  }
}

// The same with m <= B rows of x (m, in), side by side; the basis is (256, block).
template <int B>
RS_INLINE void fill_dots_of_side(const float* x, int64_t in, int64_t m, const float* basis,
                                 int64_t block, int64_t code0, int64_t code1, float* dots) {
  using Vector = typename Side<B>::Vector;
  using Stored = typename Side<B>::Stored;
  const Lines<float> side(block * B);
  for (int64_t c = code0; c < code1; ++c) {
    for (int64_t b = 0; b < m; ++b)
      for (int64_t j = 0; j < block; ++j) side[j * B + b] = x[b * in + c * block + j];
    for (int k = 0; k < kBasis; ++k) {
      Vector sum{};
      for (int64_t j = 0; j < block; ++j)
        sum += *reinterpret_cast<const Stored*>(&side[j * B]) * basis[k * block + j];
      *reinterpret_cast<Stored*>(dots + (c * kBasis + k) * B) = sum;
    }
  }
}

template <int B>
void fill_dots(const float* x, int64_t in, int64_t m, const float* basis, const float* turned,
               int64_t block, int64_t code0, int64_t code1, float* dots) {
  if constexpr (B == 1)
    fill_dots_of_one(x, turned, block, code0, code1, dots);
  else if (block == 8)  // the usual length is a constant, so that the compiler unrolls
    fill_dots_of_side<B>(x, in, m, basis, 8, code0, code1, dots);
  else
    fill_dots_of_side<B>(x, in, m, basis, block, code0, code1, dots);
}

}  // namespace
}  // namespace rs
