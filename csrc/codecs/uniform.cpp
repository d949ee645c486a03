#include "uniform.h"

#include <algorithm>
#include <cmath>

#include "../cpu/clones.h"
#include "../cpu/fast.h"
#include "../cpu/half.h"
#include "../cpu/loops.h"

namespace rs {
namespace {

constexpr int64_t kLanes = 16;  // partial sums, so that every instruction set adds in one order

struct Fit {
  float scale = 0, zero = 0;
};

// One group with its column importance, padded to whole lanes with importance 0. Weights near the
// ends of float32 are held times 2^-exponent, so that their squares are numbers too.
struct Group {
  std::vector<float> w, h;
  int exponent = 0;

  void load(const float* weights, const float* importance, int64_t n) {
    w.assign(static_cast<size_t>(round_up(n, kLanes)), 0.0f);
    h.assign(w.size(), 0.0f);
    float peak = 0;
    for (int64_t i = 0; i < n; ++i) peak = std::max(peak, std::abs(weights[i]));
    exponent = peak == 0 || (peak > 1e-12f && peak < 1e12f) ? 0 : std::ilogb(peak);
    for (int64_t i = 0; i < n; ++i)
      w[static_cast<size_t>(i)] = exponent ? std::ldexp(weights[i], -exponent) : weights[i];
    if (importance)
      std::copy(importance, importance + n, h.begin());
    else
      std::fill(h.begin(), h.begin() + n, 1.0f);
  }
};

// Importance-weighted moments of codes q (relative to the middle code) and weights.
struct Moments {
  double h, q, qq, w, qw, error;
};

// Nearest integer, ties to even, for |x| < 2^22 without a library call.
inline float nearest(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  return (x + kMagic) - kMagic;
}

// The code whose value is nearest to w. inverse = 1/scale, or 0 for a zero scale.
inline float nearest_code(float w, float inverse, float zero, float top) {
  return nearest(std::min(std::max(w * inverse + zero, 0.0f), top));
}

float inverse_of(float scale) { return scale != 0 ? 1.0f / scale : 0.0f; }

RS_CLONES void sum_moments(const float* w, const float* h, int64_t n, Fit fit, float inverse,
                           float top, float middle, float (*sums)[kLanes]) {
  for (int64_t i = 0; i < n; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) {
      const float x = w[i + j], weight = h[i + j];
      const float code = nearest_code(x, inverse, fit.zero, top);
      const float miss = x - (code - fit.zero) * fit.scale, q = code - middle, hq = weight * q;
      sums[0][j] += weight;
      sums[1][j] += hq;
      sums[2][j] += hq * q;
      sums[3][j] += weight * x;
      sums[4][j] += hq * x;
      sums[5][j] += weight * miss * miss;
    }
}

Moments moments(const Group& g, const Fit& fit, int top) {
  float sums[6][kLanes] = {};
  const float middle = 0.5f * static_cast<float>(top + 1);
  sum_moments(g.w.data(), g.h.data(), static_cast<int64_t>(g.w.size()), fit, inverse_of(fit.scale),
              static_cast<float>(top), middle, sums);
  double total[6] = {};
  for (int s = 0; s < 6; ++s)
    for (float lane : sums[s]) total[s] += lane;
  return {total[0], total[1], total[2], total[3], total[4], total[5]};
}

// Least squares for the codes that the moments were taken of: w = scale * (code - zero).
Fit solve(const Moments& m, Fit fit, int top, bool symmetric) {
  if (symmetric) {
    if (m.qq > 0) fit.scale = round_to_half(static_cast<float>(m.qw / m.qq));
    return fit;
  }
  const double determinant = m.h * m.qq - m.q * m.q;
  if (determinant <= 1e-6 * m.h * m.qq) return fit;
  const double scale = (m.h * m.qw - m.q * m.w) / determinant, offset = (m.w - scale * m.q) / m.h;
  const float held = round_to_half(static_cast<float>(scale));
  if (held == 0) return fit;
  return {held, round_to_half(static_cast<float>(0.5 * (top + 1) - offset / held))};
}

// Best scale (and zero) over a grid of clipping ranges; the best few are polished by alternating
// refits until the error stops falling. Scales are held to float16 values, so that storing them so
// is exact.
Fit fit_group(const Group& g, int64_t n, int bits, bool symmetric) {
  const int top = (1 << bits) - 1;
  const auto [low, high] = std::minmax_element(g.w.begin(), g.w.begin() + n);
  const float peak = std::max(std::abs(*low), std::abs(*high));
  const float middle = static_cast<float>(1 << (bits - 1));
  if (peak == 0) return {0, symmetric ? middle : 0};
  if (!symmetric && *low == *high) return {round_to_half(*low), -1};  // one level carries it

  struct Candidate {
    Fit fit;
    double error;
  };
  constexpr int kCandidates = 24, kPolished = 5;
  std::vector<Candidate> found;
  // Low rates clip the tails hard, high rates hardly at all.
  const float deepest = bits <= 3 ? 0.65f : bits == 4 ? 0.45f : 0.2f;
  for (int c = 0; c < kCandidates; ++c) {
    const float shrink = 1.0f - deepest * c / kCandidates;
    Fit fit;
    if (symmetric) {
      // The range is one longer below zero: turn its long side toward the largest weight.
      fit = {round_to_half((-*low >= *high ? 1.0f : -1.0f) * shrink * peak / middle), middle};
    } else {
      const float center = 0.5f * *low + 0.5f * *high, span = shrink * (*high - *low);
      fit.scale = round_to_half(span / top);
      fit.zero = round_to_half((0.5f * span - center) * inverse_of(fit.scale));
    }
    if (fit.scale == 0 || !std::isfinite(fit.scale) || !std::isfinite(fit.zero)) continue;
    found.push_back({fit, moments(g, fit, top).error});
  }
  if (found.empty()) return {0, symmetric ? middle : 0};
  std::stable_sort(found.begin(), found.end(), [](auto& a, auto& b) { return a.error < b.error; });
  Candidate best = found.front();
  for (size_t c = 0; c < std::min<size_t>(kPolished, found.size()); ++c) {
    Candidate now = found[c];
    for (int round = 0; round < 30; ++round) {
      const Fit fit = solve(moments(g, now.fit, top), now.fit, top, symmetric);
      const double error = moments(g, fit, top).error;
      if (!(error < now.error * (1 - 1e-6)) || !std::isfinite(fit.zero)) break;
      now = {fit, error};
    }
    if (now.error < best.error) best = now;
  }
  return best.fit;
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
    const Fit fit = fit_group(group, n, Bits, Symmetric);
    params[Codec::kScale][t] = std::ldexp(fit.scale, group.exponent);
    if constexpr (!Symmetric) params[Codec::kZero][t] = fit.zero;
    uint8_t* tile = codes + t * layer.tile.bytes;
    for (int64_t j = 0; j < n; ++j) {
      const float code = nearest_code(group.w[j], inverse_of(fit.scale), fit.zero, Codec::kTop);
      write_bits<Bits>(tile, j * Bits, static_cast<uint32_t>(code));
    }
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
  if (bits == Bits)
    return symmetric ? fill<Bits, true>(row, group, isa) : fill<Bits, false>(row, group, isa);
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
