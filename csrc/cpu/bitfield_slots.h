// The slots around bitfield_loops.h, included after the instruction set is switched back: nothing
// here is compiled for it but the loops it calls.
#pragma once

#include "bitfield_loops.h"
#include "parallel.h"

namespace rs {
namespace {

template <class Codec, int Block, class T>
void decode_slot(const Layer& layer, int64_t row0, int64_t row1, T* w) {
  const typename Codec::Tables tables(layer);
  decode_blocks<Codec, Block, T>(layer, tables, row0, row1, w);
}

template <class Codec, int Block>
bool linear_of_one(const Layer& layer, const typename Codec::Tables& tables, const float* x,
                   float* y) {
  if (layer.tile.cols != Block * Codec::kCodes) return false;
  parallel_for(layer.out, row_grain(layer.out, layer.in), [&](int64_t begin, int64_t end) {
    multiply_one<Codec, Block>(layer, tables, x, begin, end, y);
  });
  return true;
}

template <class Codec>
void linear_slot(const Layer& layer, const float* x, int64_t m, float* y) {
  const typename Codec::Tables tables(layer);
  if (m == 1 && (linear_of_one<Codec, 4>(layer, tables, x, y) ||
                 linear_of_one<Codec, 8>(layer, tables, x, y)))
    return;
  const int64_t codes = layer.tile_cols() * Codec::kCodes, block = layer.in / codes;
  const int64_t most = m == 1 ? 1 : m <= 4 ? 4 : kMaxBatch;
  // Whole cache lines, not set to zero: that would take as long as the dots.
  const auto room = std::make_unique_for_overwrite<Bytes[]>(
      static_cast<size_t>(codes * kBasis * most) * sizeof(float) / sizeof(Bytes));
  auto* dots = reinterpret_cast<float*>(room.get());
  const Lines<float> turned(block * kBasis);
  for (int64_t k = 0; k < kBasis; ++k)
    for (int64_t j = 0; j < block; ++j) turned[j * kBasis + k] = tables.basis[k * block + j];
  for (int64_t b = 0; b < m; b += kMaxBatch) {
    const int64_t batch = std::min<int64_t>(kMaxBatch, m - b);
    const float* rows = x + b * layer.in;
    float* out = y + b * layer.out;
    const auto run = [&]<int B>() {
      parallel_for(codes, row_grain(codes, kBasis * block), [&](int64_t begin, int64_t end) {
        fill_dots<B>(rows, layer.in, batch, tables.basis, turned.get(), block, begin, end, dots);
      });
      parallel_for(layer.out, row_grain(layer.out, layer.in), [&](int64_t begin, int64_t end) {
        multiply_rows<Codec, B>(layer, tables, dots, begin, end, batch, out);
      });
    };
    batch == 1   ? run.template operator()<1>()
    : batch <= 4 ? run.template operator()<4>()
                 : run.template operator()<kMaxBatch>();
  }
}

template <class Codec, int Block>
bool fill_decode(Row& row, int64_t block) {
  if (block != Block) return false;
  row.decode = decode_slot<Codec, Block, float>;
  row.decode_bf16 = decode_slot<Codec, Block, uint16_t>;
  return true;
}

template <class Codec>
void fill_slots(Row& row) {
  const int64_t block = row.tile.cols / Codec::kCodes;
  fill_decode<Codec, 1>(row, block) || fill_decode<Codec, 2>(row, block) ||
      fill_decode<Codec, 4>(row, block) || fill_decode<Codec, 8>(row, block) ||
      fill_decode<Codec, 16>(row, block);
  if (block < 2) return;  // a dot per weight gains nothing over decoding
  row.linear = linear_slot<Codec>;
  row.linear_max_m = block < 4 ? 1 : kMaxBatch;
}

inline void fill_slots(Row& row, int word, Amplitude amplitude) {
  if (word == 32) return fill_slots<Bitfield<32, Amplitude::byte>>(row);
  switch (amplitude) {
    case Amplitude::byte:
      return fill_slots<Bitfield<22, Amplitude::byte>>(row);
    case Amplitude::uint16:
      return fill_slots<Bitfield<22, Amplitude::uint16>>(row);
    case Amplitude::float32:
      return fill_slots<Bitfield<22, Amplitude::float32>>(row);
  }
}

}  // namespace
}  // namespace rs
