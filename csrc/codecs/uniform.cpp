#include "uniform.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../cpu/clones.h"
#include "../cpu/fast.h"
#include "../cpu/loops.h"
#include "../cpu/widths.h"
#include "uniform_fit.h"

namespace rs {
namespace {

// One group with its column importance, padded to whole lanes with importance 0. Weights are
// held times 2^-exponent.
struct Group {
  std::vector<float> w, h;
  int exponent = 0;

  void load(const float* weights, const float* importance, int64_t n) {
    w.assign(static_cast<size_t>(round_up(n, kUniformLanes)), 0.0f);
    h.assign(w.size(), 0.0f);
    float peak = 0;
    for (int64_t i = 0; i < n; ++i) peak = std::max(peak, std::abs(weights[i]));
    exponent = uniform_exponent(peak);
    for (int64_t i = 0; i < n; ++i)
      w[static_cast<size_t>(i)] = exponent ? std::ldexp(weights[i], -exponent) : weights[i];
    if (importance)
      std::copy(importance, importance + n, h.begin());
    else
      std::fill(h.begin(), h.begin() + n, 1.0f);
  }
};

RS_CLONES void sum_moments(const float* w, const float* h, int64_t n, UniformFit fit, float inverse,
                           float top, float middle, float (*sums)[kUniformLanes]) {
  for (int64_t i = 0; i < n; i += kUniformLanes)
    for (int64_t j = 0; j < kUniformLanes; ++j)
      uniform_terms(w[i + j], h[i + j], fit, inverse, top, middle,
                    [&](int s, float term) { sums[s][j] += term; });
}

UniformMoments moments(const Group& g, UniformFit fit, int top) {
  float sums[6][kUniformLanes] = {};
  sum_moments(g.w.data(), g.h.data(), static_cast<int64_t>(g.w.size()), fit, inverse_of(fit.scale),
              static_cast<float>(top), 0.5f * static_cast<float>(top + 1), sums);
  double total[6] = {};
  for (int s = 0; s < 6; ++s)
    for (float lane : sums[s]) total[s] += lane;
  return {total[0], total[1], total[2], total[3], total[4], total[5]};
}

template <int Bits, bool Symmetric>
void encode(const Layer& layer, const float* w, const EncodeOptions& options, int64_t tile0,
            int64_t tile1, uint8_t* codes, float* const* params) {
  using Codec = Uniform<Bits, Symmetric>;
  const int64_t n = layer.tile.cols;
  Group group;
  for (int64_t t = tile0; t < tile1; ++t) {
    const int64_t col = t % layer.tile_cols() * n;
    group.load(w + t / layer.tile_cols() * layer.in + col,
               options.importance ? options.importance + col : nullptr, n);
    const auto [low, high] = std::minmax_element(group.w.begin(), group.w.begin() + n);
    const UniformFit fit = fit_uniform(*low, *high, Bits, Symmetric, [&](UniformFit now) {
      return moments(group, now, Codec::kTop);
    });
    params[Codec::kScale][t] = std::ldexp(fit.scale, group.exponent);
    if constexpr (!Symmetric) params[Codec::kZero][t] = fit.zero;
    uint8_t* tile = codes + t * layer.tile.bytes;
    for (int64_t j = 0; j < n; ++j) {
      const float code = nearest_code(group.w[j], inverse_of(fit.scale), fit.zero, Codec::kTop);
      write_bits<Bits>(tile, j * Bits, static_cast<uint32_t>(code));
    }
  }
}

// The codes of a group as numbers, eight at a time from the Bits bytes that they are.
template <int Bits>
void unpack(const uint8_t* tile, int64_t n, float* codes) {
  int64_t j = 0;
  for (; j + 8 <= n; j += 8, tile += Bits) {
    uint64_t word = 0;
    std::memcpy(&word, tile, Bits);
    for (int k = 0; k < 8; ++k)
      codes[j + k] = static_cast<float>(static_cast<int>(word >> (Bits * k)) & ((1 << Bits) - 1));
  }
  for (int64_t k = 0; j < n; ++j, ++k)
    codes[j] = static_cast<float>(read_bits<Bits>(tile, k * Bits));
}

struct GroupSums {
  float level = 0, all = 0;
};

// Of (code - zero) * dw and of dw, in lanes: one order on every instruction set.
template <int L>
RS_INLINE void sum_group(const float* codes, const float* dw, int64_t n, float zero,
                         GroupSums& sums) {
  constexpr int kLanes = static_cast<int>(kUniformLanes);
  Wide<float, kLanes, L> level = {}, all = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Wide<float, kLanes, L> code, d;
    code.load(codes + i);
    d.load(dw + i);
    all += d;
    for (auto& v : code.v) v -= zero;
    d *= code;
    level += d;
  }
  sums = {sum_lanes(level.v), sum_lanes(all.v)};
  for (; i < n; ++i) sums.level += (codes[i] - zero) * dw[i], sums.all += dw[i];
}

// adjoint_loop for whole groups at a time.
template <int Bits, bool Symmetric>
void adjoint(const Layer& layer, int64_t row0, int64_t row1, const float* dw, float* const* grads) {
  using Codec = Uniform<Bits, Symmetric>;
  const typename Codec::Tables tables(layer);
  const int64_t n = layer.tile.cols;
  std::vector<float> codes(static_cast<size_t>(n));
  for (int64_t t = row0 * tables.groups; t < row1 * tables.groups; ++t, dw += n) {
    unpack<Bits>(layer.codes + t * layer.tile.bytes, n, codes.data());
    GroupSums sums;
    const float zero = Symmetric ? Codec::kHalf : tables.zero[t];
    by_width([&]<int L>() RS_LAMBDA { sum_group<L>(codes.data(), dw, n, zero, sums); });
    if (grads[Codec::kScale]) grads[Codec::kScale][t] += sums.level;
    if constexpr (!Symmetric) {
      if (grads[Codec::kZero]) grads[Codec::kZero][t] -= tables.scale[t] * sums.all;
    }
  }
}

void check_padding(const Layer& layer, int64_t tile, int bits) {
  const int64_t used = layer.tile.cols * bits % 8;
  const uint8_t* bytes = layer.codes + tile * layer.tile.bytes;
  if (used && bytes[layer.tile.bytes - 1] >> used)
    throw std::invalid_argument("the padding bits after a group must be zero");
}

}  // namespace

std::vector<Term> uniform_terms(const Spec& spec, Shape shape) {
  spec.only({"bits", "group", "symmetric"});
  const double bits = spec.number("bits", 4), wanted = spec.number("group", 64);
  const bool symmetric = spec.flag("symmetric", false);
  if (bits != std::floor(bits) || bits < 2 || bits > 8)
    throw std::invalid_argument("uniform: bits must be a whole number from 2 to 8, got " +
                                spec.word("bits", ""));
  if (wanted != std::floor(wanted) || wanted < 1 || wanted > (1 << 20))
    throw std::invalid_argument("uniform: group must be a whole number from 1 to 1048576, got " +
                                spec.word("group", ""));
  const auto group = static_cast<int64_t>(wanted);
  Term term;
  Row& row = term.row;
  row.name = "uniform";
  row.tile = {1, group, (group * static_cast<int64_t>(bits) + 7) / 8};
  const std::vector<int64_t> sizes{shape.out, round_up(shape.in, group) / group};
  row.params.push_back({"scale", Axis::both, sizes});
  if (!symmetric) row.params.push_back({"zero", Axis::both, sizes});
  row.encode_batch = std::max<int64_t>(1, 4096 / group);
  with_uniform(static_cast<int>(bits), symmetric, [&]<int Bits, bool Symmetric> {
    row.decode = decode_loop<Uniform<Bits, Symmetric>>;
    row.adjoint = adjoint<Bits, Symmetric>;
    row.encode = encode<Bits, Symmetric>;
    row.check = [](const Layer& layer, int64_t tile) { check_padding(layer, tile, Bits); };
  });
  uniform_fast_slots(row, static_cast<int>(bits), symmetric, group, current_isa());
  return {term};
}

}  // namespace rs
