#include "uniform.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "../cpu/fast.h"
#include "../cpu/half.h"
#include "../cpu/loops.h"

namespace rs {
namespace {

struct Fit {
  float scale = 0, zero = 0;
  double error = std::numeric_limits<double>::infinity();
};

// One group of a row with its column importance.
struct Group {
  const float *w, *importance;
  int64_t n;
  double weight(int64_t i) const { return importance ? importance[i] : 1.0; }
};

float nearest_code(float w, const Fit& fit, int top) {
  if (fit.scale == 0) return std::clamp(std::nearbyint(fit.zero), 0.0f, float(top));
  return std::clamp(std::nearbyint(w / fit.scale + fit.zero), 0.0f, float(top));
}

double error_of(const Group& g, const Fit& fit, int top) {
  double error = 0;
  for (int64_t i = 0; i < g.n; ++i) {
    const double miss = g.w[i] - mul(add(nearest_code(g.w[i], fit, top), -fit.zero), fit.scale);
    error += g.weight(i) * miss * miss;
  }
  return error;
}

// Least squares for scale and zero with the codes that `fit` would choose: w = scale * code + offset.
Fit refit(const Group& g, const Fit& fit, int top, bool symmetric) {
  double s0 = 0, sq = 0, sqq = 0, sw = 0, sqw = 0;
  for (int64_t i = 0; i < g.n; ++i) {
    const double h = g.weight(i), q = nearest_code(g.w[i], fit, top) - (symmetric ? fit.zero : 0);
    s0 += h, sq += h * q, sqq += h * q * q, sw += h * g.w[i], sqw += h * q * g.w[i];
  }
  Fit next = fit;
  if (symmetric) {
    if (sqq > 0) next.scale = round_to_half(static_cast<float>(sqw / sqq));
    return next;
  }
  const double det = s0 * sqq - sq * sq;
  if (det <= 1e-12 * s0 * sqq) return next;
  const double scale = (s0 * sqw - sq * sw) / det, offset = (sw - scale * sq) / s0;
  next.scale = round_to_half(static_cast<float>(scale));
  if (next.scale != 0) next.zero = round_to_half(static_cast<float>(-offset / next.scale));
  return next;
}

// Best scale (and zero) over a grid of clipping ranges, each polished by alternating refits until
// the error stops falling. Scales are held to float16 values, so that storing them so is exact.
Fit fit_group(const Group& g, int bits, bool symmetric) {
  const int top = (1 << bits) - 1;
  const auto [low, high] = std::minmax_element(g.w, g.w + g.n);
  const float peak = std::max(std::abs(*low), std::abs(*high));
  Fit best;
  if (peak == 0) {
    best = {0, symmetric ? float(1 << (bits - 1)) : 0, 0};
    return best;
  }
  const int candidates = bits <= 4 ? 24 : 8;
  for (int c = 0; c < candidates; ++c) {
    // Low rates clip the tails hard, high rates hardly at all.
    const float shrink = 1.0f - (bits <= 3 ? 0.65f : bits == 4 ? 0.45f : 0.15f) * c / candidates;
    Fit fit;
    if (symmetric) {
      // The range is one longer below zero: turn its long side toward the largest weight.
      const float side = -*low >= *high ? 1.0f : -1.0f;
      fit.zero = float(1 << (bits - 1));
      fit.scale = round_to_half(side * shrink * peak / fit.zero);
    } else if (*high > *low) {
      const float middle = 0.5f * (*low + *high), span = shrink * (*high - *low);
      fit.scale = round_to_half(span / top);
      fit.zero = fit.scale ? round_to_half(-(middle - 0.5f * span) / fit.scale) : 0;
    } else {  // a constant group: one level carries it
      fit.scale = round_to_half(*low);
      fit.zero = -1;
    }
    if (!std::isfinite(fit.zero)) continue;
    fit.error = error_of(g, fit, top);
    for (int round = 0; round < 20; ++round) {
      Fit next = refit(g, fit, top, symmetric);
      if (!std::isfinite(next.zero)) break;
      next.error = error_of(g, next, top);
      if (!(next.error < fit.error * (1 - 1e-6))) break;
      fit = next;
    }
    if (fit.error < best.error) best = fit;
  }
  return best;
}

template <int Bits, bool Symmetric>
void encode(const Layer& layer, const float* w, const EncodeOptions& options, int64_t tile0,
            int64_t tile1, uint8_t* codes, float* const* params) {
  using Codec = Uniform<Bits, Symmetric>;
  const int64_t group = layer.tile.cols;
  for (int64_t t = tile0; t < tile1; ++t) {
    const int64_t col = t % layer.tile_cols() * group;
    const Group g{w + t / layer.tile_cols() * layer.in + col,
                  options.importance ? options.importance + col : nullptr, group};
    const Fit fit = fit_group(g, Bits, Symmetric);
    params[Codec::kScale][t] = fit.scale;
    if constexpr (!Symmetric) params[Codec::kZero][t] = fit.zero;
    uint8_t* tile = codes + t * layer.tile.bytes;
    for (int64_t j = 0; j < group; ++j)
      write_bits<Bits>(tile, j * Bits, static_cast<uint32_t>(nearest_code(g.w[j], fit, Codec::kTop)));
  }
}

void check_padding(const Layer& layer, int64_t tile, int bits) {
  const int64_t used = layer.tile.cols * bits % 8;
  const uint8_t* bytes = layer.codes + tile * layer.tile.bytes;
  if (used && bytes[layer.tile.bytes - 1] >> used)
    throw std::invalid_argument("the padding bits after a group must be zero");
}

template <int Bits, bool Symmetric>
void fill(Row& row, int64_t group, Isa isa) {
  using Codec = Uniform<Bits, Symmetric>;
  row.decode = decode_loop<Codec>;
  row.adjoint = adjoint_loop<Codec>;
  row.encode = encode<Bits, Symmetric>;
  row.check = [](const Layer& layer, int64_t tile) { check_padding(layer, tile, Bits); };
  uniform_fast_slots(row, Bits, Symmetric, group, isa);
}

template <int Bits>
void choose(Row& row, int bits, bool symmetric, int64_t group, Isa isa) {
  if (bits == Bits) return symmetric ? fill<Bits, true>(row, group, isa) : fill<Bits, false>(row, group, isa);
  if constexpr (Bits < 8) choose<Bits + 1>(row, bits, symmetric, group, isa);
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
  choose<2>(row, static_cast<int>(bits), symmetric, group, current_isa());
  return {term};
}

}  // namespace rs
