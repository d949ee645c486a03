#include "cyclic_product.h"

#include <atomic>
#include <cmath>
#include <limits>

#include "clones.h"
#include "fast.h"
#include "integers.h"
#include "parallel.h"

namespace rs {
namespace {

constexpr int64_t kStrip = 32;       // columns whose tables stay in the first cache
constexpr int64_t kRowBlock = 1024;  // rows whose codes stay in the second cache
constexpr int64_t kTables = 16;      // rows of x at a time, a quarter of a megabyte each
constexpr int kByteTop = 127;
constexpr int64_t kMostVectors = 256;

// The basis by columns, (block, vectors).
struct Basis {
  int64_t block, vectors;
  std::vector<float> columns;

  Basis(const Layer& layer, int64_t vectors)
      : block(layer.tile.cols), vectors(vectors), columns(static_cast<size_t>(block * vectors)) {
    const float* basis = layer.params[kCyclicBasis];
    for (int64_t k = 0; k < vectors; ++k)
      for (int64_t j = 0; j < block; ++j)
        columns[static_cast<size_t>(j * vectors + k)] = basis[k * block + j];
  }
};

std::vector<int32_t> to_bytes(const float* x, int64_t n, const Quantum& quantum) {
  std::vector<int32_t> q(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) q[static_cast<size_t>(i)] = quantum(x[i]);
  return q;
}

// dots[k] = x . v_k for a basis by columns.
RS_CLONES void float_dots(const float* x, const float* columns, int64_t block, int64_t vectors,
                          float* dots) {
  for (int64_t k = 0; k < vectors; ++k) dots[k] = x[0] * columns[k];
  for (int64_t j = 1; j < block; ++j)
    for (int64_t k = 0; k < vectors; ++k) dots[k] += x[j] * columns[j * vectors + k];
}
RS_CLONES void integer_dots(const int32_t* x, const int32_t* columns, int64_t block,
                            int64_t vectors, int32_t* dots) {
  for (int64_t k = 0; k < vectors; ++k) dots[k] = x[0] * columns[k];
  for (int64_t j = 1; j < block; ++j)
    for (int64_t k = 0; k < vectors; ++k) dots[k] += x[j] * columns[j * vectors + k];
}

RS_CLONES uint32_t peak_bits(const float* x, int64_t n) {
  uint32_t peak = 0;  // magnitudes order like their bits, with NaN above infinity
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(x[i]) & 0x7FFFFFFFu;
    peak = bits > peak ? bits : peak;
  }
  return peak;
}
RS_CLONES int32_t peak_of(const int32_t* x, int64_t n) {
  int32_t peak = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t size = x[i] < 0 ? -x[i] : x[i];
    peak = size > peak ? size : peak;
  }
  return peak;
}

RS_CLONES void to_words(const float* x, int64_t n, float inverse, int16_t* q) {
  for (int64_t i = 0; i < n; ++i)
    q[i] = static_cast<int16_t>(std::bit_cast<uint32_t>(x[i] * inverse + 12582912.0f));
}
RS_CLONES void to_words(const int32_t* x, int64_t n, int16_t* q) {
  for (int64_t i = 0; i < n; ++i) q[i] = static_cast<int16_t>(x[i]);
}

// Every run of 256 words as their lower bytes, then their upper ones.
RS_CLONES void to_planes(int16_t* words, int64_t runs) {
  for (int64_t run = 0; run < runs; ++run, words += 256) {
    uint8_t planes[512];
    for (int i = 0; i < 256; ++i) planes[i] = static_cast<uint8_t>(words[i]);
    for (int i = 0; i < 256; ++i) planes[256 + i] = static_cast<uint8_t>(words[i] >> 8);
    __builtin_memcpy(words, planes, sizeof planes);
  }
}

template <class T>
void raise(std::atomic<T>& peak, T value) {
  T before = peak.load();
  while (value > before && !peak.compare_exchange_weak(before, value)) {
  }
}

// Dot products of one row of x with the basis, [column][vector].
struct DotTable {
  Lines<int16_t> narrow;
  std::vector<int32_t> wide;  // instead, when 16 bits do not hold them
  double unit = 0;
  bool planes;

  DotTable(int64_t columns, int64_t vectors, bool planes)
      : narrow(round_up(columns, kStrip) * vectors), planes(planes) {}

  void fill_float(const float* x, const Basis& basis, int64_t columns, float* dots) {
    const int64_t n = basis.vectors;
    std::atomic<uint32_t> peak{0};
    parallel_for(columns, kStrip, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        float_dots(x + c * basis.block, basis.columns.data(), basis.block, n, dots + c * n);
      raise(peak, peak_bits(dots + begin * n, (end - begin) * n));
    });
    const float most = std::bit_cast<float>(peak.load());
    const Quantum quantum(&most, 1, kCyclicTop);
    unit = quantum.unit;
    parallel_for(columns, kStrip, [&](int64_t begin, int64_t end) {
      to_words(dots + begin * n, (end - begin) * n, quantum.inverse, narrow.get() + begin * n);
      if (planes) to_planes(narrow.get() + begin * n, end - begin);
    });
  }
  void fill_integer(const float* x, const Basis& basis, int64_t columns) {
    const int64_t n = basis.vectors, size = basis.block * n;
    const Quantum of_x(x, columns * basis.block, kByteTop),
        of_basis(basis.columns.data(), size, kByteTop);
    const std::vector<int32_t> q = to_bytes(x, columns * basis.block, of_x),
                               v = to_bytes(basis.columns.data(), size, of_basis);
    std::atomic<int32_t> peak{0};
    parallel_for(columns, kStrip, [&](int64_t begin, int64_t end) {
      int32_t dots[kMostVectors], most = 0;
      for (int64_t c = begin; c < end; ++c) {
        integer_dots(q.data() + c * basis.block, v.data(), basis.block, n, dots);
        most = std::max(most, peak_of(dots, n));
        to_words(dots, n, narrow.get() + c * n);
      }
      raise(peak, most);
      if (planes) to_planes(narrow.get() + begin * n, end - begin);
    });
    wide.clear();
    if (peak.load() > kCyclicTop) {
      wide.resize(static_cast<size_t>(columns * n));
      for (int64_t c = 0; c < columns; ++c)
        integer_dots(q.data() + c * basis.block, v.data(), basis.block, n, wide.data() + c * n);
    }
    unit = double{of_x.unit} * of_basis.unit;
  }
};

template <class Word, class Dot>
void sums_of_rows(const uint8_t* codes, int64_t row_bytes, int64_t rows, int64_t columns,
                  const Dot* table, int64_t* sums) {
  std::fill_n(sums, rows, 0);
  for (int64_t c0 = 0; c0 < columns; c0 += kStrip) {
    const int64_t c1 = std::min(columns, c0 + kStrip);
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t* row = codes + r * row_bytes;
      int64_t sum = 0;
      for (int64_t c = c0; c < c1; ++c) {
        const uint32_t word = cyclic_word<Word>(row + c * Word::kBytes);
        const Dot dot = table[c * Word::kVectors + Word::index(word)];
        sum += int64_t{cyclic_level<Word>(word)} * dot;
      }
      sums[r] += sum;
    }
  }
}

template <class Word>
void sums_of_batch(const uint8_t* codes, int64_t row_bytes, int64_t rows, int64_t columns,
                   const int16_t* const* tables, int64_t batch, int64_t* sums) {
  for (int64_t b = 0; b < batch; ++b)
    sums_of_rows<Word>(codes, row_bytes, rows, columns, tables[b], sums + b * rows);
}

#if RS_FAST_X86
template <class Word>
void sums_avx2(const uint8_t* codes, int64_t row_bytes, int64_t rows, int64_t columns,
               const int16_t* const* tables, int64_t batch, int64_t* sums) {
  cyclic_sums_avx2(Word(), codes, row_bytes, rows, columns, tables, batch, sums);
}
template <class Word>
void sums_avx512(const uint8_t* codes, int64_t row_bytes, int64_t rows, int64_t columns,
                 const int16_t* const* tables, int64_t batch, int64_t* sums) {
  cyclic_sums_avx512(Word(), codes, row_bytes, rows, columns, tables, batch, sums);
}
#endif

template <class Word, bool Integers, CyclicSums Sums, bool Planes = false>
void linear(const Layer& layer, const float* x, int64_t m, float* y) {
  const int64_t columns = layer.tile_cols(), row_bytes = columns * Word::kBytes;
  const Basis basis(layer, Word::kVectors);
  // Kept over the batch: fresh pages for every row cost as much as the dot products.
  std::vector<DotTable> tables;
  const int64_t most = std::min(kTables, m);
  for (int64_t b = 0; b < most; ++b) tables.emplace_back(columns, Word::kVectors, Planes);
  const auto dots = std::make_unique_for_overwrite<float[]>(
      static_cast<size_t>(Integers ? 0 : columns * Word::kVectors));
  for (int64_t b0 = 0; b0 < m; b0 += kTables) {
    const int64_t batch = std::min(kTables, m - b0);
    std::vector<const int16_t*> narrow;
    std::vector<int64_t> of_narrow, of_wide;  // rows of x
    for (int64_t b = 0; b < batch; ++b) {
      DotTable& table = tables[static_cast<size_t>(b)];
      const float* row = x + (b0 + b) * layer.in;
      Integers ? table.fill_integer(row, basis, columns)
               : table.fill_float(row, basis, columns, dots.get());
      table.unit /= 1 << Word::kShift;
      if (table.wide.empty()) narrow.push_back(table.narrow.get());
      (table.wide.empty() ? of_narrow : of_wide).push_back(b);
    }
    parallel_for(layer.out, row_grain(layer.out, layer.in), [&](int64_t begin, int64_t end) {
      std::vector<int64_t> all(static_cast<size_t>(most * kRowBlock));
      int64_t* sums = all.data();
      for (int64_t r = begin; r < end; r += kRowBlock) {
        const int64_t rows = std::min(kRowBlock, end - r);
        const uint8_t* codes = layer.codes + r * row_bytes;
        const auto write = [&](int64_t b, const int64_t* from) {
          const double unit = tables[static_cast<size_t>(b)].unit;
          for (int64_t i = 0; i < rows; ++i)
            y[(b0 + b) * layer.out + r + i] =
                static_cast<float>(static_cast<double>(from[i]) * unit);
        };
        Sums(codes, row_bytes, rows, columns, narrow.data(), std::ssize(narrow), sums);
        for (size_t i = 0; i < of_narrow.size(); ++i)
          write(of_narrow[i], sums + static_cast<int64_t>(i) * rows);
        for (const int64_t b : of_wide) {
          sums_of_rows<Word>(codes, row_bytes, rows, columns,
                             tables[static_cast<size_t>(b)].wide.data(), sums);
          write(b, sums);
        }
      }
    });
  }
}

// --- the gradient to the input, activation=int8
// ---------------------------------------------------

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
  const Basis basis(layer, kVectors);
  const Quantum of_basis(basis.columns.data(), block * kVectors, kByteTop);
  const std::vector<int32_t> v = to_bytes(basis.columns.data(), block * kVectors, of_basis);

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

constexpr int64_t kDirectBatch = 16;  // beyond, panels of weights are as fast

template <class Word, bool Integers>
void choose_linear(Row& row, Isa isa) {
  row.linear = linear<Word, Integers, sums_of_batch<Word>>;
#if RS_FAST_X86
  if (isa >= Isa::avx2) row.linear = linear<Word, Integers, sums_avx2<Word>>;
  if (isa >= Isa::avx512)
    row.linear = linear<Word, Integers, sums_avx512<Word>, Word::kVectors == 256>;
#endif
}

}  // namespace

template <class Word>
void cyclic_product_slots(Row& row, bool integers, Isa isa) {
#if RS_FAST_X86
  if (isa >= Isa::avx512 && row.tile.cols == 8) cyclic_decode_avx512_slots(Word(), row);
#endif
  if (integers) {
    choose_linear<Word, true>(row, isa);
    row.linear_grad_input = linear_grad_input<Word, scatter>;
#if RS_FAST_X86
    if (isa >= Isa::avx2) row.linear_grad_input = linear_grad_input<Word, cyclic_scatter_avx2>;
    if (isa >= Isa::avx512) row.linear_grad_input = linear_grad_input<Word, cyclic_scatter_avx512>;
#endif
    row.linear_max_m = std::numeric_limits<int64_t>::max();
    row.linear_type = "int8 activations and basis, exact integer sums";
  } else if (row.tile.cols >= 4) {  // shorter, the dot products are more work than the weights
    choose_linear<Word, false>(row, isa);
    row.linear_max_m = kDirectBatch;
    row.linear_type = "16-bit dot products with the basis per row, exact integer sums";
  }
}

template void cyclic_product_slots<Cyclic16Word>(Row&, bool, Isa);
template void cyclic_product_slots<CyclicCompoundWord>(Row&, bool, Isa);
template void cyclic_product_slots<Cyclic32Word>(Row&, bool, Isa);

}  // namespace rs
