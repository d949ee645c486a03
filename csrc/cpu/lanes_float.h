// Products of codes that are decoded to float32 in registers. Included by lanes_avx2.h and
// lanes_avx512.h behind their `#pragma GCC target`, so internal to a file. They bring
//   Floats, Some              a register, and which of its lanes
//   load_some, store_some     those lanes from and to memory
//   sum_lanes, add_product
//   kStoresBf16               whether store_some also rounds to bfloat16
#pragma once

namespace rs {
namespace {

// Rows of x times decoded rows. Rows(layer) makes what all rows share;
// each(row, tile0, tile1, visit) calls visit(i, j, w, some) for up to a register of weights of
// these tiles, those from column j on, with a constant i that rises by one or more. kGrouped: tiles
// have params of their own, which strips would keep from being fetched in time.
template <class Rows, int B>
void float_product(const Layer& layer, const float* x, int64_t m, float* y, int64_t row0,
                   int64_t row1) {
  constexpr int kSums = B == 1 ? 4 : 8 / B;  // independent, so that additions need not wait
  constexpr bool kStrips = B == kMaxBatch && !Rows::kGrouped;
  constexpr int kRows = kStrips ? kStripRows : 1;
  const Rows rows(layer);
  const RowStarts<B> from(x, m, layer.in);
  const int64_t tiles = layer.tile_cols(), strip = kStrips ? strip_tiles(layer) : tiles;
  for (int64_t row = row0; row < row1; row += kRows) {
    Floats total[kRows][B];
    for (auto& sums : total)
      for (Floats& sum : sums) sum = Floats{};
    for (int64_t t = 0; t < tiles; t += strip)
      for (int r = 0; r < kRows && row + r < row1; ++r) {
        Floats sums[kSums][B];
        const int64_t next = (row + r) * tiles + t + strip;
        prefetch_tiles(layer, next, next + strip);
#pragma GCC unroll 4
        for (int i = 0; i < kSums; ++i)
#pragma GCC unroll 8
          for (int b = 0; b < B; ++b) sums[i][b] = i ? Floats{} : total[r][b];
        rows.each(row + r, t, std::min(t + strip, tiles),
                  [&](int i, int64_t j, Floats w, Some some) RS_LAMBDA {
#pragma GCC unroll 8
                    for (int b = 0; b < B; ++b) {
                      Floats& sum = sums[i % kSums][b];
                      sum = add_product(sum, w, load_some(from.at[b] + j, some));
                    }
                  });
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) {
#pragma GCC unroll 4
          for (int i = 1; i < kSums; ++i) sums[0][b] += sums[i][b];
          total[r][b] = sums[0][b];
        }
      }
    for (int r = 0; r < kRows && row + r < row1; ++r)
      for (int b = 0; b < B && b < m; ++b) y[b * layer.out + row + r] = sum_lanes(total[r][b]);
  }
}
template <class Rows>
constexpr FloatKernel kFloatKernels[4] = {float_product<Rows, 1>, float_product<Rows, 2>,
                                          float_product<Rows, 4>, float_product<Rows, 8>};

template <class Rows, class T>
void decode_rows(const Layer& layer, int64_t row0, int64_t row1, T* w) {
  const Rows rows(layer);
  for (int64_t row = row0; row < row1; ++row, w += layer.in)
    rows.each(row, 0, layer.tile_cols(), [&](int, int64_t j, Floats value, Some some) RS_LAMBDA {
      store_some(w + j, value, some);
    });
}

// Products in float32 for batches up to kMaxBatch, of a codec's rows, and decode.
template <class Rows>
void fill_float_slots(Row& row) {
  row.decode = decode_rows<Rows, float>;
  if constexpr (kStoresBf16) row.decode_bf16 = decode_rows<Rows, uint16_t>;
  row.linear = [](const Layer& layer, const float* x, int64_t m, float* y) {
    float_linear(layer, x, m, y, kFloatKernels<Rows>);
  };
  row.linear_max_m = kMaxBatch;
}

}  // namespace
}  // namespace rs
