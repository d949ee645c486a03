// The gradient to the input of `cyclic`, activation=int8, in integers.
#include <limits>
#include <vector>

#include "clones.h"
#include "cyclic_product.h"
#include "fast.h"
#include "integers.h"
#include "parallel.h"

namespace rs {
namespace {

constexpr int kByteTop = 127;

void scatter(const int16_t* level, const uint8_t* bin, const int8_t* g, int64_t rows,
             int32_t* bins) {
  for (int64_t r = 0; r < rows; ++r)
    for (int l = 0; l < kCyclicLanes; ++l)
      bins[bin[r] * kCyclicLanes + l] += level[r] * g[r * kCyclicLanes + l];
}
RS_CLONES void drain(int32_t* bins, int64_t n, double* total) {
  for (int64_t i = 0; i < n; ++i) total[i] += bins[i];
  for (int64_t i = 0; i < n; ++i) bins[i] = 0;
}
// sum[lane] = sum over vectors of total[vector][lane] * component[vector]
RS_CLONES void contract(const double* total, const int32_t* component, int64_t vectors,
                        double* sum) {
  for (int l = 0; l < kCyclicLanes; ++l) sum[l] = 0;
  for (int64_t k = 0; k < vectors; ++k)
    for (int l = 0; l < kCyclicLanes; ++l) sum[l] += total[k * kCyclicLanes + l] * component[k];
}

// Levels and indices of `width` columns of codes, [column][row].
template <class Word>
void read_columns(const Layer& layer, int64_t column, int64_t width, int64_t stride, int16_t* level,
                  uint8_t* index) {
  constexpr int64_t kRows = 32;  // whose lines the first cache holds, far apart as they are
  const int64_t row_bytes = layer.tile_cols() * Word::kBytes;
  const uint8_t* codes = layer.codes + column * Word::kBytes;
  for (int64_t r0 = 0; r0 < layer.out; r0 += kRows)
    for (int64_t c = 0; c < width; ++c)
      for (int64_t r = r0; r < std::min(layer.out, r0 + kRows); ++r) {
        const uint32_t word = cyclic_word<Word>(codes + r * row_bytes + c * Word::kBytes);
        level[c * stride + r] = static_cast<int16_t>(cyclic_level<Word>(word));
        index[c * stride + r] = static_cast<uint8_t>(Word::index(word));
      }
}

// dx = dy @ T in integers. Every code adds level * dy to the bin of its vector; then the bins meet
// the vectors. Bins are 32-bit, drained before they can overflow; the rest is exact in float64 for
// up to 2^23 rows.
template <class Word, CyclicScatter Scatter>
void linear_grad_input(const Layer& layer, const float* grad, int64_t m, float* dx) {
  constexpr int64_t kVectors = Word::kVectors, kMost = int64_t{127} * (Word::kAmps - 1) * kByteTop,
                    kRows = std::numeric_limits<int32_t>::max() / kMost;
  const int64_t columns = layer.tile_cols(), block = layer.tile.cols, out = layer.out;
  const float* basis = layer.params[kCyclicBasis];
  const Quantum of_basis(basis, block * kVectors, kByteTop);
  std::vector<int32_t> v(static_cast<size_t>(block * kVectors));  // (block, vectors)
  for (int64_t k = 0; k < kVectors; ++k)
    for (int64_t j = 0; j < block; ++j)
      v[static_cast<size_t>(j * kVectors + k)] = of_basis(basis[k * block + j]);

  const int64_t chunks = (m + kCyclicLanes - 1) / kCyclicLanes;
  const Lines<int8_t> g(chunks * out * kCyclicLanes);  // [chunk][row][lane]
  std::vector<double> unit(static_cast<size_t>(m));
  parallel_for(m, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Quantum quantum(grad + b * out, out, kByteTop);
      unit[static_cast<size_t>(b)] = double{quantum.unit} * of_basis.unit / (1 << Word::kShift);
      int8_t* to = g.get() + b / kCyclicLanes * out * kCyclicLanes + b % kCyclicLanes;
      for (int64_t r = 0; r < out; ++r)
        to[r * kCyclicLanes] = static_cast<int8_t>(quantum(grad[b * out + r]));
    }
  });

  constexpr int64_t kColumns = 64 / Word::kBytes;  // read together: a cache line of every row
  parallel_for(columns, kColumns, [&](int64_t begin, int64_t end) {
    // Of a line's columns, [column][row]; the stride keeps the columns in different cache sets.
    const int64_t stride = round_up(out, 2048) + 64;
    const Lines<int16_t> level(kColumns * stride);
    const Lines<uint8_t> bin(kColumns * stride);
    const Lines<int32_t> bins(kVectors * kCyclicLanes);
    const Lines<double> total(kVectors * kCyclicLanes);
    for (int64_t c = begin; c < end; ++c) {
      const int64_t place = (c - begin) % kColumns;
      if (place == 0)
        read_columns<Word>(layer, c, std::min(kColumns, end - c), stride, level.get(), bin.get());
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        std::fill_n(total.get(), kVectors * kCyclicLanes, 0.0);
        for (int64_t r = 0; r < out; r += kRows) {
          Scatter(level.get() + place * stride + r, bin.get() + place * stride + r,
                  g.get() + (chunk * out + r) * kCyclicLanes, std::min(kRows, out - r), bins.get());
          drain(bins.get(), kVectors * kCyclicLanes, total.get());
        }
        const int64_t lanes = std::min<int64_t>(kCyclicLanes, m - chunk * kCyclicLanes);
        for (int64_t j = 0; j < block; ++j) {
          double sum[kCyclicLanes];
          contract(total.get(), v.data() + j * kVectors, kVectors, sum);
          for (int64_t l = 0; l < lanes; ++l) {
            const int64_t b = chunk * kCyclicLanes + l;
            dx[b * layer.in + c * block + j] =
                static_cast<float>(sum[l] * unit[static_cast<size_t>(b)]);
          }
        }
      }
    }
  });
}

}  // namespace

template <class Word>
void cyclic_grad_input_slot(Row& row, Isa isa) {
  row.linear_grad_input = linear_grad_input<Word, scatter>;
#if RS_FAST_X86
  if (isa >= Isa::avx2) row.linear_grad_input = linear_grad_input<Word, cyclic_scatter_avx2>;
  if (isa >= Isa::avx512) row.linear_grad_input = linear_grad_input<Word, cyclic_scatter_avx512>;
#endif
}

template void cyclic_grad_input_slot<Cyclic16Word>(Row&, Isa);
template void cyclic_grad_input_slot<CyclicCompoundWord>(Row&, Isa);
template void cyclic_grad_input_slot<Cyclic32Word>(Row&, Isa);

}  // namespace rs
