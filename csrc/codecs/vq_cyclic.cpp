#include "vq_cyclic.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../cpu/clones.h"
#include "../cpu/fast.h"
#include "../cpu/half.h"
#include "../cpu/loops.h"
#include "../cpu/strips.h"

namespace rs {
namespace {

constexpr int64_t kLanes = 64;  // vectors searched at once

// The nearest of all 64 codewords for vectors given by component: w[j * kLanes + lane], importance
// h likewise. A codeword and its negative are one candidate: with dot = sum h w p and power = sum h
// p^2 the better sign leaves power - 2 |dot| of the error.
RS_CLONES void search(const float* w, const float* h, const float* prototypes, int block,
                      float* least, int32_t* code) {
  for (int64_t l = 0; l < kLanes; ++l) least[l] = INFINITY, code[l] = 0;
  for (int32_t c = 0; c < kVqCodes / 2; ++c) {
    float dot[kLanes] = {}, power[kLanes] = {};
    for (int j = 0; j < block; ++j) {
      const float p = prototypes[vq_source(static_cast<uint32_t>(c), j, block)];
      const float *wj = w + j * kLanes, *hj = h + j * kLanes;
      for (int64_t l = 0; l < kLanes; ++l) {
        const float hp = hj[l] * p;
        dot[l] += hp * wj[l];
        power[l] += hp * p;
      }
    }
    for (int64_t l = 0; l < kLanes; ++l) {
      const float cost = power[l] - 2.0f * std::abs(dot[l]);
      const int32_t signed_code = dot[l] < 0 ? c | 32 : c;
      const bool better = cost < least[l];
      least[l] = better ? cost : least[l];
      code[l] = better ? signed_code : code[l];
    }
  }
}

void encode(const Layer& layer, const float* w, const EncodeOptions& options, int64_t tile0,
            int64_t tile1, uint8_t* codes, float* const*) {
  const int block = static_cast<int>(layer.tile.cols / 4);
  std::vector<float> by_part(static_cast<size_t>(2 * kLanes * block));
  float *parts = by_part.data(), *importance = parts + kLanes * block;
  float least[kLanes];
  int32_t code[kLanes];
  for_each_strip(layer, w, options, tile0, tile1,
                 [&](int64_t tile, int64_t count, const float* strip, const float* h) {
                   uint8_t* at = codes + tile * layer.tile.bytes;
                   for (int64_t v = 0; v < 4 * count; v += kLanes) {
                     const int64_t n = std::min(kLanes, 4 * count - v);
                     for (int64_t l = 0; l < n; ++l)
                       for (int j = 0; j < block; ++j) {
                         parts[j * kLanes + l] = strip[(v + l) * block + j];
                         importance[j * kLanes + l] = h[(v + l) * block + j];
                       }
                     search(parts, importance, layer.params[VqCyclic::kPrototypeValues], block,
                            least, code);
                     for (int64_t l = 0; l < n; ++l)
                       write_bits<6>(at, 6 * (v + l), static_cast<uint32_t>(code[l]));
                   }
                 });
}

inline void put(float value, float* to) { *to = value; }
inline void put(float value, uint16_t* to) { *to = to_bf16(value); }

// Copies of the codewords, all 64 of which are made first. Block 0: known at run time only.
template <int Block, class T>
void copy_codewords(const Layer& layer, int64_t row0, int64_t row1, T* w) {
  const VqCyclic::Tables tables(layer);
  const int block = Block ? Block : tables.block;
  std::vector<T> words(static_cast<size_t>(kVqCodes * block));
  for (uint32_t code = 0; code < kVqCodes; ++code)
    for (int j = 0; j < block; ++j) {
      const float value = tables.prototypes[vq_source(code, j, block)];
      put(vq_negative(code) ? -value : value, &words[code * static_cast<size_t>(block) + j]);
    }
  const uint8_t* tile = layer.codes + row0 * layer.tile_cols() * 3;
  for (int64_t n = (row1 - row0) * layer.tile_cols(); n > 0; --n, tile += 3) {
    const uint32_t codes =
        tile[0] | static_cast<uint32_t>(tile[1]) << 8 | static_cast<uint32_t>(tile[2]) << 16;
    for (int v = 0; v < 4; ++v, w += block)
      std::memcpy(w, &words[(codes >> (6 * v) & 63) * static_cast<size_t>(block)],
                  sizeof(T) * static_cast<size_t>(block));
  }
}

template <class T>
void decode(const Layer& layer, int64_t row0, int64_t row1, T* w) {
  const int64_t block = layer.tile.cols / 4;
  const auto copy = block == 4   ? copy_codewords<4, T>
                    : block == 8 ? copy_codewords<8, T>
                                 : copy_codewords<0, T>;
  copy(layer, row0, row1, w);
}

}  // namespace

std::vector<Term> vq_cyclic_terms(const Spec& spec, Shape shape) {
  spec.only({"block"});
  const double block = spec.number("block", 4);
  if (block != std::floor(block) || block < 4 || block > kVqLargestBlock ||
      static_cast<int>(block) % 4 != 0)
    throw std::invalid_argument("vq_cyclic: block must be a multiple of 4 from 4 to 256, got " +
                                spec.word("block", ""));
  Term term;
  Row& row = term.row;
  row.name = "vq_cyclic";
  row.tile = {1, 4 * static_cast<int64_t>(block), 3};
  row.params = {{"prototypes", Axis::shared, {kPrototypes, static_cast<int64_t>(block)}},
                {"out_scale", Axis::out, {shape.out}}};
  row.out_scale = VqCyclic::kOutScale;
  row.decode = decode_loop<VqCyclic>;
  if (block <= 32) {  // beyond, the codewords are more than a usual row
    row.decode = decode<float>;
    row.decode_bf16 = decode<uint16_t>;
  }
  row.adjoint = adjoint_loop<VqCyclic>;
  row.encode = encode;
  row.encode_batch = std::max<int64_t>(1, 8192 / row.tile.cols);
  vq_cyclic_fast_slots(row, static_cast<int64_t>(block), current_isa());
  return {term};
}

}  // namespace rs
