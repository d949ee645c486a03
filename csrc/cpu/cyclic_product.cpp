#include "cyclic_product.h"

#include <limits>

#include "cyclic_dots.h"
#include "fast.h"
#include "parallel.h"

namespace rs {
namespace {

constexpr int64_t kStrip = 32;  // columns whose tables stay in the first cache

// Rows whose codes and sums stay in the second cache while all tables pass.
constexpr int64_t row_block(int lanes) { return std::clamp(128 * lanes, 256, 1024); }

// The sums of one row of x, `apart` from each other, with a table of so many side by side.
template <class Word, class Dot>
void sums_of_rows(const uint8_t* codes, int64_t row_bytes, int64_t rows, int64_t columns,
                  const Dot* table, int64_t lanes, int64_t* sums, int64_t apart) {
  for (int64_t r = 0; r < rows; ++r) sums[r * apart] = 0;
  for (int64_t c0 = 0; c0 < columns; c0 += kStrip) {
    const int64_t c1 = std::min(columns, c0 + kStrip);
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t* row = codes + r * row_bytes;
      int64_t sum = 0;
      for (int64_t c = c0; c < c1; ++c) {
        const uint32_t word = cyclic_word<Word>(row + c * Word::kBytes);
        const Dot dot = table[(c * Word::kVectors + Word::index(word)) * lanes];
        sum += int64_t{cyclic_level<Word>(word)} * dot;
      }
      sums[r * apart] += sum;
    }
  }
}

template <class Word>
void generic_sums(const uint8_t* codes, int64_t row_bytes, int64_t rows, int64_t columns,
                  const int16_t* table, int lanes, int64_t* sums) {
  for (int b = 0; b < lanes; ++b)
    sums_of_rows<Word>(codes, row_bytes, rows, columns,
                       lanes == 1 ? table : table + cyclic_lane(b, lanes), lanes, sums + b, lanes);
}

template <class Word, Isa I>
CyclicKernel kernel_for(int64_t batch) {
#if RS_FAST_X86
  if (I == Isa::avx512) return cyclic_kernel_avx512<Word>(batch);
  if (I == Isa::avx2) return cyclic_kernel_avx2<Word>(batch);
#endif
  return {generic_sums<Word>, batch > 1 ? 8 : 1, batch <= 1};
}

template <class Word, bool Integers, Isa I>
void linear(const Layer& layer, const float* x, int64_t m, float* y) {
  const int64_t columns = layer.tile_cols(), row_bytes = columns * Word::kBytes;
  CyclicDots dots(layer, Word::kVectors, Integers, kernel_for<Word, I>(m).lanes);
  for (int64_t b0 = 0; b0 < m;) {
    const auto [sums_of, lanes, apart] = kernel_for<Word, I>(m - b0);
    const auto batch = static_cast<int>(std::min<int64_t>(lanes, m - b0));
    dots.fill(x + b0 * layer.in, batch, lanes, apart);
    std::vector<std::vector<int32_t>> wide(static_cast<size_t>(batch));
    for (int b = 0; b < batch; ++b)
      if (dots.is_wide(b)) wide[b] = dots.wide_table(b);
    parallel_for(
        layer.out, row_grain(layer.out, layer.in),
        [&, sums_of = sums_of, lanes = lanes, apart = apart](int64_t begin, int64_t end) {
          const int64_t block = row_block(lanes);
          std::vector<int64_t> sums(static_cast<size_t>(block * lanes));
          for (int64_t r = begin; r < end; r += block) {
            const int64_t rows = std::min(block, end - r);
            const uint8_t* codes = layer.codes + r * row_bytes;
            sums_of(codes, row_bytes, rows, columns, dots.table(), lanes, sums.data());
            for (int b = 0; b < batch; ++b)
              if (dots.is_wide(b))
                sums_of_rows<Word>(codes, row_bytes, rows, columns, wide[b].data(), 1,
                                   sums.data() + b, lanes);
            constexpr int64_t kTurned = 16;  // rows at a time: their sums stay in the first cache
            for (int64_t i0 = 0; i0 < rows; i0 += kTurned)
              for (int b = 0; b < batch; ++b) {
                const double unit = dots.unit(b) / (1 << Word::kShift);
                float* to = y + (b0 + b) * layer.out + r;
                for (int64_t i = i0; i < std::min(rows, i0 + kTurned); ++i)
                  to[i] = static_cast<float>(static_cast<double>(sums[i * lanes + b]) * unit);
              }
          }
        });
    b0 += batch;
  }
}

constexpr int64_t kDirectBatch = 16;  // beyond, panels of weights are as fast as plain loops

template <class Word, bool Integers>
void choose_linear(Row& row, Isa isa) {
  row.linear = linear<Word, Integers, Isa::generic>;
#if RS_FAST_X86
  if (isa >= Isa::avx2) row.linear = linear<Word, Integers, Isa::avx2>;
  if (isa >= Isa::avx512) row.linear = linear<Word, Integers, Isa::avx512>;
#endif
}

}  // namespace

template <class Word>
void cyclic_product_slots(Row& row, bool integers, Isa isa) {
  constexpr int64_t kAny = std::numeric_limits<int64_t>::max();
#if RS_FAST_X86
  if (isa >= Isa::avx2) cyclic_decode_avx2_slots(Word(), row);
  if (isa >= Isa::avx512 && row.tile.cols == 8) cyclic_decode_avx512_slots(Word(), row);
#endif
  if (integers) {
    choose_linear<Word, true>(row, isa);
    cyclic_grad_input_slot<Word>(row, isa);
    row.linear_max_m = kAny;
    row.linear_type = "int8 activations and basis, exact integer sums";
  } else if (row.tile.cols >= 4) {  // shorter, the dot products are more work than the weights
    choose_linear<Word, false>(row, isa);
    row.linear_max_m = isa >= Isa::avx2 && row.tile.cols >= 8 ? kAny : kDirectBatch;
    row.linear_type = "16-bit dot products with the basis per row, exact integer sums";
  }
}

template void cyclic_product_slots<Cyclic16Word>(Row&, bool, Isa);
template void cyclic_product_slots<CyclicCompoundWord>(Row&, bool, Isa);
template void cyclic_product_slots<Cyclic32Word>(Row&, bool, Isa);

}  // namespace rs
