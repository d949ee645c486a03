#include "hybrid.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "../cpu/clones.h"
#include "../cpu/integers.h"
#include "../cpu/parallel.h"
#include "../cpu/widths.h"

namespace rs {

HybridTables::HybridTables(int64_t side)
    : side(side),
      cosine(std::make_unique<float[]>(static_cast<size_t>(side * side))),
      smooth(std::make_unique<float[]>(static_cast<size_t>(kSmooth * side * side))) {
  for (int64_t u = 0; u < side; ++u)
    for (int64_t i = 0; i < side; ++i)
      cosine[u * side + i] = hybrid_wave((2 * i + 1) * u, u ? 2 : 1, side);
  for (int64_t at = 0; at < side * side; ++at) {
    float b[kSmooth];
    hybrid_functions(at / side, at % side, side, b);
    for (int64_t k = 0; k < kSmooth; ++k) smooth[k * side * side + at] = b[k];
  }
}

const HybridTables& HybridTables::get(int64_t side) {
  static const HybridTables t8(8), t16(16), t32(32), t64(64);
  if (side == 8) return t8;
  if (side == 16) return t16;
  if (side == 32) return t32;
  if (side == 64) return t64;
  static const HybridTables t128(128), t256(256);
  return side == 128 ? t128 : t256;
}

namespace {

constexpr int64_t kLanes = kHybridLanes;

template <int L>
RS_INLINE void smooth(const HybridTables& tables, const float* c, const float* t, float* w,
                      int64_t stride) {
  const int64_t side = tables.side, plane = side * side, width = hybrid_width(side);
  const float* b = tables.smooth.get();
  for (int64_t i = 0; i < side; ++i, b += side, w += stride) {
    int64_t j = 0;
    for (; j + L <= side; j += L) {
      VectorOf<float, L> sum = 0.0f + c[0] * at<float, L>(b + j);
#pragma GCC unroll 8
      for (int64_t k = 1; k < kSmooth; ++k) sum += c[k] * at<float, L>(b + k * plane + j);
      if (t) sum += at<float, L>(t + i * width + j);
      at<float, L>(w + j) = sum;
    }
    for (; j < side; ++j) {
      float sum = 0.0f + c[0] * b[j];
      for (int64_t k = 1; k < kSmooth; ++k) sum += c[k] * b[k * plane + j];
      w[j] = t ? sum + t[i * width + j] : sum;
    }
  }
}

template <int L>
RS_INLINE void waves(const HybridTables& tables, float* g) {
  using Floats = VectorOf<float, L>;
  constexpr int kSums = 8;  // in registers
  const int64_t side = tables.side, width = hybrid_width(side);
  const float* cosine = tables.cosine.get();
  Floats t[256];
  for (float* column = g; column < g + side; column += L) {
    t[0] = cosine[0] * at<float, L>(column);
    for (int64_t n = 2; n <= side; n *= 2) {
      const int64_t step = side / n, half = n / 2;
      int64_t i = 0;
      for (; i + kSums <= half; i += kSums) {
        Floats odd[kSums] = {};
        for (int64_t u = step; u < side; u += 2 * step) {
          const Floats row = at<float, L>(column + u * width);
          const float* wave = cosine + u * side + i;
#pragma GCC unroll 8
          for (int k = 0; k < kSums; ++k) odd[k] += wave[k] * row;
        }
        for (int k = 0; k < kSums; ++k) {
          const Floats even = t[i + k];
          t[i + k] = even + odd[k];
          t[n - 1 - i - k] = even - odd[k];
        }
      }
      for (; i < half; ++i) {
        Floats odd = {};
        for (int64_t u = step; u < side; u += 2 * step)
          odd += cosine[u * side + i] * at<float, L>(column + u * width);
        const Floats even = t[i];
        t[i] = even + odd;
        t[n - 1 - i] = even - odd;
      }
    }
    for (int64_t i = 0; i < side; ++i) at<float, L>(column + i * width) = t[i];
  }
}

// half_value of `count` words, a multiple of kLanes.
template <int L>
RS_INLINE void half_values(const uint8_t* words, int64_t count, float* values) {
  using Floats = VectorOf<float, L>;
  using Bits = VectorOf<uint32_t, L>;
  for (int64_t e = 0; e < count; e += L) {
    VectorOf<uint16_t, L> halves;
    __builtin_memcpy(&halves, words + 2 * e, sizeof halves);
    const Bits bits = __builtin_convertvector(halves, Bits);
    const Bits exponent = bits & 0x7C00, size = (bits & 0x7FFF) << 13;
    const Floats denormal = (Floats)(size + (113u << 23)) - 0x1p-14f;
    Floats any = (Floats)(size + (112u << 23));
    any = exponent == 0 ? denormal : any;
    any = exponent == 0x7C00 ? Floats{} : any;
    any = (Floats)((Bits)any ^ (bits & 0x8000) << 16) * 0x1p-8f;
    __builtin_memcpy(values + e, &any, sizeof any);
  }
}
void half_values(const uint8_t* words, int64_t count, float* values) {
  by_width([&]<int L>() RS_LAMBDA { half_values<L>(words, count, values); });
}

}  // namespace

RS_CLONES void hybrid_spread(const HybridTables& tables, const uint16_t* position,
                             const float* value, int64_t terms, float* g) {
  const int64_t side = tables.side, width = hybrid_width(side);
  std::memset(g, 0, static_cast<size_t>(side * width) * sizeof(float));
  for (int64_t e = 0; e < terms; ++e) {
    const int64_t at = position[e] & (side * side - 1);
    const float *wave = tables.cosine.get() + at % side * side, v = value[e];
    float* row = g + at / side * width;
    for (int64_t j = 0; j < side; ++j) row[j] += v * wave[j];
  }
}

void hybrid_waves(const HybridTables& tables, float* g) {
  by_width([&]<int L>() RS_LAMBDA { waves<L>(tables, g); });
}

void hybrid_smooth(const HybridTables& tables, const float* coefficients, const float* t, float* w,
                   int64_t stride) {
  by_width([&]<int L>() RS_LAMBDA { smooth<L>(tables, coefficients, t, w, stride); });
}

namespace {

// A tile's numbers, unpacked.
struct Unpacked {
  int64_t terms;
  std::vector<uint16_t> position;
  std::vector<float> coefficient, value;  // in whole vectors
  explicit Unpacked(int64_t terms)
      : terms(terms),
        position(static_cast<size_t>(terms)),
        coefficient(kLanes),
        value(static_cast<size_t>(round_up(terms, kLanes))) {}

  void read(const uint8_t* bytes) {
    uint8_t few[2 * kLanes] = {};
    std::memcpy(few, bytes, 2 * kSmooth);
    half_values(few, kLanes, coefficient.data());
    bytes += 2 * kSmooth;
    if (terms) std::memcpy(position.data(), bytes, static_cast<size_t>(2 * terms));
    bytes += 2 * terms;
    const int64_t whole = terms / kLanes * kLanes;
    half_values(bytes, whole, value.data());
    if (whole == terms) return;
    std::memcpy(few, bytes + 2 * whole, static_cast<size_t>(2 * (terms - whole)));
    half_values(few, kLanes, value.data() + whole);
  }
};

int64_t terms_of(const Layer& layer) { return (layer.tile.bytes - 2 * kSmooth) / 4; }

void decode(const Layer& layer, int64_t row0, int64_t row1, float* w) {
  const int64_t side = layer.tile.rows, terms = terms_of(layer);
  const HybridTables& tables = HybridTables::get(side);
  Unpacked tile(terms);
  std::vector<float> g(static_cast<size_t>(side * hybrid_width(side)));
  for (int64_t tr = row0 / side; tr < row1 / side; ++tr)
    for (int64_t tc = 0; tc < layer.tile_cols(); ++tc) {
      tile.read(layer.codes + (tr * layer.tile_cols() + tc) * layer.tile.bytes);
      float* out = w + (tr * side - row0) * layer.in + tc * side;
      hybrid_spread(tables, tile.position.data(), tile.value.data(), terms, g.data());
      hybrid_waves(tables, g.data());
      hybrid_smooth(tables, tile.coefficient.data(), g.data(), out, layer.in);
    }
}

// --- linear ---

// In the frequency domain: each block of x is transformed once, a tile then costs one multiply-add
// for each of its terms, and a row of tiles is transformed back once. Eight rows of x lie side by
// side and cost about as much as one. Sums here are float64: of a block's terms some rows see
// little, and cancelled ones would keep the roundings of all.

constexpr int kEight = 8;
template <int L>
using Doubles = Wide<double, kEight, L>;

// What one block of x, or eight side by side, look like to every tile below them:
// wave[v] = sum_j D[v][j] x[j] and smooth[k][i] = sum_j b[k](i,j) x[j], `lanes` of each.
template <int L>
RS_INLINE void see(const HybridTables& tables, int64_t lanes, const double* x, double* seen) {
  const int64_t side = tables.side;
  const auto* eight = reinterpret_cast<const Doubles<L>*>(x);
  for (int64_t row = 0; row < side + kSmooth * side; ++row) {
    const float* a =
        row < side ? tables.cosine.get() + row * side : tables.smooth.get() + (row - side) * side;
    if (lanes == kEight) {
      Doubles<L> sum = {}, other = {};
      for (int64_t j = 0; j < side; j += 2) {
        sum.add(eight[j], a[j]);
        other.add(eight[j + 1], a[j + 1]);
      }
      sum += other;
      reinterpret_cast<Doubles<L>*>(seen)[row] = sum;
      continue;
    }
    double sum[kEight] = {};
    for (int64_t j = 0; j < side / kEight; ++j)
      for (int lane = 0; lane < kEight; ++lane)
        sum[lane] += static_cast<double>(a[j * kEight + lane]) * x[j * kEight + lane];
    seen[row] = ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
  }
}

RS_INLINE void add(double& sum, double a, double factor) { sum += a * factor; }
template <int L>
RS_INLINE void add(Doubles<L>& sum, const Doubles<L>& a, double factor) {
  sum.add(a, factor);
}

// Adds a tile's smooth part to y and its terms to sums by frequency, of which there are four in
// turns so that neighbours do not wait for each other. T: a double or eight.
template <class T>
RS_INLINE void meet(const Unpacked& tile, int64_t side, const double* seen, double* sums,
                    double* y) {
  const float* c = tile.coefficient.data();
  const auto *wave = reinterpret_cast<const T*>(seen), *smooth = wave + side;
  auto *total = reinterpret_cast<T*>(y), *frequency = reinterpret_cast<T*>(sums);
  for (int64_t i = 0; i < side; ++i) {
    T sum = {};
    for (int64_t k = 0; k < kSmooth; ++k) add(sum, smooth[k * side + i], c[k]);
    total[i] += sum;
  }
  const int64_t terms = tile.terms, low = side - 1;
  const int shift = std::countr_zero(static_cast<uint64_t>(side));
  const uint16_t* position = tile.position.data();
  const float* value = tile.value.data();
  for (int64_t e = 0; e < terms; ++e)
    add(frequency[(e & 3) * side + ((position[e] >> shift) & low)], wave[position[e] & low],
        value[e]);
}

template <class T>
RS_INLINE void add_transform(const HybridTables& tables, const double* sums, double* y) {
  const int64_t side = tables.side;
  const auto* at = reinterpret_cast<const T*>(sums);
  auto* total = reinterpret_cast<T*>(y);
  for (int64_t u = 0; u < side; ++u) {
    T sum = at[u], other = at[2 * side + u];
    sum += at[side + u];
    other += at[3 * side + u];
    sum += other;
    const float* wave = tables.cosine.get() + u * side;
    for (int64_t i = 0; i < side; ++i) add(total[i], sum, wave[i]);
  }
}

// m rows of x, at most `lanes`.
void lanes_linear(const Layer& layer, const float* x, int64_t m, float* y, int64_t lanes) {
  const int64_t side = layer.tile.rows, n = layer.tile_cols(), terms = terms_of(layer);
  const int64_t own = (side + kSmooth * side) * lanes;  // of a block of x
  const HybridTables& tables = HybridTables::get(side);
  const Lines<double> seen(n * own);
  parallel_for(n, 1, [&](int64_t begin, int64_t end) {
    const Lines<double> columns(side * lanes);
    for (int64_t tc = begin; tc < end; ++tc) {
      for (int64_t b = 0; b < m; ++b)
        for (int64_t j = 0; j < side; ++j) columns[j * lanes + b] = x[b * layer.in + tc * side + j];
      by_width([&]<int L>()
                   RS_LAMBDA { see<L>(tables, lanes, columns.get(), seen.get() + tc * own); });
    }
  });
  parallel_for(layer.out, side, [&](int64_t row0, int64_t row1) {
    Unpacked tile(terms);
    // The sums by frequency, four times, then y.
    const Lines<double> sums(5 * side * lanes);
    double* total = sums.get() + 4 * side * lanes;
    for (int64_t r = row0; r < row1; r += side) {
      std::fill_n(sums.get(), 5 * side * lanes, 0.0);
      for (int64_t tc = 0; tc < n; ++tc) {
        tile.read(layer.codes + (r / side * n + tc) * layer.tile.bytes);
        const double* block = seen.get() + tc * own;
        by_width([&]<int L>() RS_LAMBDA {
          lanes == 1 ? meet<double>(tile, side, block, sums.get(), total)
                     : meet<Doubles<L>>(tile, side, block, sums.get(), total);
        });
      }
      by_width([&]<int L>() RS_LAMBDA {
        lanes == 1 ? add_transform<double>(tables, sums.get(), total)
                   : add_transform<Doubles<L>>(tables, sums.get(), total);
      });
      for (int64_t b = 0; b < m; ++b)
        for (int64_t i = 0; i < side; ++i)
          y[b * layer.out + r + i] = static_cast<float>(total[i * lanes + b]);
    }
  });
}

void linear(const Layer& layer, const float* x, int64_t m, float* y) {
  const int64_t lanes = m == 1 ? 1 : kEight;
  for (int64_t b = 0; b < m; b += lanes)
    lanes_linear(layer, x + b * layer.in, std::min(lanes, m - b), y + b * layer.out, lanes);
}

void check(const Layer& layer, int64_t t) {
  const uint8_t* tile = layer.codes + t * layer.tile.bytes;
  const int64_t terms = terms_of(layer);
  const auto word = [&](int64_t at) {
    return static_cast<uint32_t>(tile[2 * at] | tile[2 * at + 1] << 8);
  };
  const auto places = static_cast<uint32_t>(layer.tile.rows * layer.tile.cols);
  const auto finite = [](uint32_t bits) {
    if ((bits & 0x7C00) == 0x7C00) throw std::invalid_argument("a float16 is not finite");
  };
  for (int64_t k = 0; k < kSmooth; ++k) finite(word(k));
  for (int64_t e = 0; e < terms; ++e) {
    finite(word(kSmooth + terms + e));
    const uint32_t position = word(kSmooth + e);
    if (position >= places || (e && position <= word(kSmooth + e - 1)))
      throw std::invalid_argument("positions must rise and lie inside the block");
  }
}

}  // namespace

std::vector<Term> hybrid_terms(const Spec& spec, Shape shape) {
  spec.only({"block", "terms"});
  const double block = spec.number("block", 64), wanted = spec.number("terms", 252);
  bool known = false;
  for (int side = 8; side <= 256; side *= 2) known |= block == side;
  if (!known)
    throw std::invalid_argument("hybrid: block must be a power of two from 8 to 256, got " +
                                spec.word("block", ""));
  if (!(wanted >= 0 && wanted <= block * block && wanted == std::floor(wanted)))
    throw std::invalid_argument(
        "hybrid: terms must be a whole number from 0 to the weights of a block, got " +
        spec.word("terms", "252"));
  const auto side = static_cast<int64_t>(block), terms = static_cast<int64_t>(wanted);
  Term term;
  Row& row = term.row;
  row.name = "hybrid";
  row.tile = {side, side, 2 * kSmooth + 4 * terms};
  row.params = {{"out_scale", Axis::out, {shape.out}}};
  row.out_scale = 0;
  row.decode = decode;
  row.adjoint = [](const Layer&, int64_t, int64_t, const float*, float* const*) {};
  row.linear = linear;
  row.linear_max_m = 16;
  row.encode = hybrid_encode;
  row.encode_batch = std::max<int64_t>(1, 4096 / (side * side));
  row.check = check;
  return {term};
}

}  // namespace rs
