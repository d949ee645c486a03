#include "adaptive_precision.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "../cpu/adaptive_precision_fast.h"
#include "../cpu/clones.h"
#include "../cpu/half.h"
#include "../cpu/loops.h"

namespace rs {

AdaptiveCounts::AdaptiveCounts(int64_t groups, double high, double middle) {
  const auto n = static_cast<double>(groups);
  of[2] = std::min(groups, static_cast<int64_t>(std::floor(high * n + 0.5)));
  of[1] = std::min(groups - of[2], static_cast<int64_t>(std::floor(middle * n + 0.5)));
  of[0] = groups - of[1] - of[2];
}

int64_t AdaptiveCounts::bytes() const {
  int64_t total = (of[0] + of[1] + of[2] + 3) / 4;
  for (int k = 0; k < 3; ++k) total += of[k] * AdaptivePrecision::size(k);
  return total;
}

namespace {

constexpr int64_t kLanes = 16;  // partial sums, so that every instruction set adds in one order
static_assert(kLanes == kAdaptiveGroup);

// Nearest integer, ties to even, for |x| < 2^22 without a library call.
inline float nearest(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  return (x + kMagic) - kMagic;
}
inline float nearest_code(float w, float half_inverse, float middle, float top) {
  return nearest(std::min(std::max(w * half_inverse + middle, 0.0f), top));
}

// Weighted moments of the levels (from -1 to 1) nearest to w for this scale.
struct Moments {
  double lw, ll, error;
};

RS_CLONES void sum_moments(const float* w, const float* h, int64_t n, float scale,
                           float half_inverse, float top, float unit, float (*sums)[kLanes]) {
  for (int64_t i = 0; i < n; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) {
      const float x = w[i + j], weight = h[i + j];
      const float level = (2 * nearest_code(x, half_inverse, 0.5f * top, top) - top) * unit;
      const float miss = x - level * scale, hl = weight * level;
      sums[0][j] += hl * x;
      sums[1][j] += hl * level;
      sums[2][j] += weight * miss * miss;
    }
}

// Codes per weight: half the inverse of half a step; 0 for a scale that has none.
float half_inverse_of(float scale, int kind) {
  const float codes = 0.5f * static_cast<float>(kAdaptiveTop[kind]) / scale;
  return std::isfinite(codes) ? codes : 0.0f;
}

Moments moments(const std::vector<float>& w, const std::vector<float>& h, float scale, int kind) {
  float sums[3][kLanes] = {};
  sum_moments(w.data(), h.data(), static_cast<int64_t>(w.size()), scale,
              half_inverse_of(scale, kind), static_cast<float>(kAdaptiveTop[kind]),
              kAdaptiveUnit[kind], sums);
  double total[3] = {};
  for (int s = 0; s < 3; ++s)
    for (float lane : sums[s]) total[s] += lane;
  return {total[0], total[1], total[2]};
}

// Best scale over a grid of clipping ranges, polished by refits in turns with the codes. Held to
// float16 values, so that storing it so is exact.
float fit_scale(const std::vector<float>& w, const std::vector<float>& h, int kind) {
  float peak = 0;
  for (float x : w) peak = std::max(peak, std::abs(x));
  if (peak == 0) return 0;
  // Low rates clip the tails hard, high rates hardly at all.
  constexpr int kCandidates[3] = {16, 16, 6};
  constexpr float kDeepest[3] = {0.65f, 0.4f, 0.02f};
  const int count = kCandidates[kind];
  std::vector<std::pair<double, float>> found;
  for (int c = 0; c < count; ++c) {
    const float shrink = 1 - kDeepest[kind] * static_cast<float>(c) / static_cast<float>(count);
    const float scale = round_to_half(shrink * peak);
    if (scale != 0) found.push_back({moments(w, h, scale, kind).error, scale});
  }
  if (found.empty()) return 0;
  std::stable_sort(found.begin(), found.end(), [](auto& a, auto& b) { return a.first < b.first; });
  found.resize(std::min<size_t>(found.size(), 6));
  auto best = found.front();
  for (auto now : found) {
    for (int round = 0; round < 12; ++round) {
      const Moments m = moments(w, h, now.second, kind);
      const float scale = m.ll > 0 ? round_to_half(static_cast<float>(m.lw / m.ll)) : now.second;
      if (scale == now.second || !std::isfinite(scale)) break;
      const double error = moments(w, h, scale, kind).error;
      if (!(error < now.first)) break;
      now = {error, scale};
    }
    if (now.first < best.first) best = now;
  }
  return best.second;
}

// One window: its weights times 2^-exponent (so that squares near the ends of float32 are numbers
// too) with their importance, and what is chosen for it.
struct Window {
  std::vector<float> w, h;
  int64_t groups, real;  // real: up to the last group that is not zero
  int exponent = 0;

  explicit Window(int64_t width)
      : w(static_cast<size_t>(width)), h(w.size()), groups(width / kAdaptiveGroup) {}

  void load(const float* row, const float* importance) {
    const auto width = static_cast<int64_t>(w.size());
    float peak = 0;
    for (int64_t i = 0; i < width; ++i) peak = std::max(peak, std::abs(row[i]));
    exponent = peak == 0 || (peak > 1e-12f && peak < 1e12f) ? 0 : std::ilogb(peak);
    real = 0;
    for (int64_t i = 0; i < width; ++i) {
      w[i] = exponent ? std::ldexp(row[i], -exponent) : row[i];
      h[i] = importance ? importance[i] : 1.0f;
      if (w[i] != 0) real = i / kAdaptiveGroup + 1;
    }
  }

  // Class of each group by the sum of w^2, times the importance or not.
  std::vector<int> rank(const AdaptiveCounts& counts, bool weighted) const {
    std::vector<double> energy(static_cast<size_t>(groups));
    for (size_t i = 0; i < w.size(); ++i)
      energy[i / kAdaptiveGroup] += static_cast<double>(w[i]) * w[i] * (weighted ? h[i] : 1.0f);
    std::vector<int64_t> order(energy.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return energy[a] > energy[b]; });
    std::vector<int> kinds(energy.size());
    for (int64_t place = 0; place < groups; ++place)
      kinds[order[place]] = place < counts.of[2] ? 2 : place < counts.of[2] + counts.of[1] ? 1 : 0;
    return kinds;
  }

  // Scales of the classes; returns the weighted error. Zeros at the end are the padding of a row,
  // which must not draw a scale to itself.
  double fit(const std::vector<int>& kinds, float* scales) const {
    double error = 0;
    std::vector<float> own, weight;
    for (int k = 0; k < 3; ++k) {
      own.clear(), weight.clear();
      for (int64_t g = 0; g < real; ++g) {
        if (kinds[g] != k) continue;
        const int64_t at = g * kAdaptiveGroup;
        own.insert(own.end(), w.begin() + at, w.begin() + at + kAdaptiveGroup);
        weight.insert(weight.end(), h.begin() + at, h.begin() + at + kAdaptiveGroup);
      }
      scales[k] = fit_scale(own, weight, k);
      error += moments(own, weight, scales[k], k).error;
    }
    return error;
  }
};

void encode(const Layer& layer, const float* w, const EncodeOptions& options, int64_t tile0,
            int64_t tile1, uint8_t* codes, float* const* params, const AdaptiveCounts& counts) {
  const int64_t width = layer.tile.cols;
  Window window(width);
  for (int64_t t = tile0; t < tile1; ++t) {
    const int64_t col = t % layer.tile_cols() * width;
    window.load(w + t / layer.tile_cols() * layer.in + col,
                options.importance ? options.importance + col : nullptr);
    float scales[3], others[3];
    std::vector<int> kinds = window.rank(counts, true);
    const double error = window.fit(kinds, scales);
    if (options.importance) {
      // Which groups share a range counts too: the plain ranking may leave less weighted error.
      const std::vector<int> plain = window.rank(counts, false);
      if (plain != kinds && window.fit(plain, others) < error) {
        kinds = plain;
        std::copy(others, others + 3, scales);
      }
    }
    for (int k = 0; k < 3; ++k) params[0][t * 3 + k] = std::ldexp(scales[k], window.exponent);

    uint8_t *tile = codes + t * layer.tile.bytes, *out = tile + (window.groups + 3) / 4;
    for (int64_t g = 0; g < window.groups; ++g) {
      const int k = kinds[g], bits = kAdaptiveBits[k];
      const auto top = static_cast<float>(kAdaptiveTop[k]);
      const float half_inverse = half_inverse_of(scales[k], k);
      tile[g / 4] = static_cast<uint8_t>(tile[g / 4] | k << (2 * (g % 4)));
      for (int j = 0; j < kAdaptiveGroup; ++j) {
        const auto code = static_cast<uint32_t>(
            nearest_code(window.w[g * kAdaptiveGroup + j], half_inverse, 0.5f * top, top));
        const int shift = bits * j % 8;
        uint8_t* byte = out + bits * j / 8;
        byte[0] = static_cast<uint8_t>(byte[0] | code << shift);
        if (shift + bits > 8) byte[1] = static_cast<uint8_t>(byte[1] | code >> (8 - shift));
      }
      out += AdaptivePrecision::size(k);
    }
  }
}

// The shares of a layer's spec; they are checked when its terms are made.
AdaptiveCounts counts_of(const Spec& spec, int64_t groups) {
  return {groups, spec.number("high", 0.25), spec.number("middle", 0.5)};
}

void check(const Layer& layer, int64_t tile) {
  const int64_t groups = layer.tile.cols / kAdaptiveGroup;
  const AdaptiveCounts counts = counts_of(*layer.spec, groups);
  const uint8_t* bytes = layer.codes + tile * layer.tile.bytes;
  int64_t found[4] = {};
  for (int64_t g = 0; g < (groups + 3) / 4 * 4; ++g) {
    const int kind = bytes[g / 4] >> (2 * (g % 4)) & 3;
    if (g >= groups && kind) throw std::invalid_argument("the padding of the map must be zero");
    if (g < groups) ++found[kind];
  }
  if (found[0] != counts.of[0] || found[1] != counts.of[1] || found[2] != counts.of[2])
    throw std::invalid_argument("the map must have as many groups of each class as the settings");
}

}  // namespace

std::vector<Term> adaptive_precision_terms(const Spec& spec, Shape shape) {
  spec.only({"window", "high", "middle"});
  const double window = spec.number("window", 128), high = spec.number("high", 0.25),
               middle = spec.number("middle", 0.5);
  if (!(window >= 16 && window <= 65536 && std::fmod(window, 16) == 0))
    throw std::invalid_argument(
        "adaptive_precision: window must be a multiple of 16 from 16 to 65536, got " +
        spec.word("window", ""));
  if (!(high >= 0 && middle >= 0 && high + middle <= 1))
    throw std::invalid_argument(
        "adaptive_precision: high and middle must be shares of at most 1 together, got " +
        spec.word("high", "0.25") + " and " + spec.word("middle", "0.5"));
  const auto width = static_cast<int64_t>(window);
  const AdaptiveCounts counts(width / kAdaptiveGroup, high, middle);
  Term term;
  Row& row = term.row;
  row.name = "adaptive_precision";
  row.tile = {1, width, counts.bytes()};
  row.params = {{"scale", Axis::both, {shape.out, round_up(shape.in, width) / width, 3}}};
  row.decode = decode_loop<AdaptivePrecision>;
  row.adjoint = adjoint_loop<AdaptivePrecision>;
  row.encode = [](const Layer& layer, const float* w, const EncodeOptions& options, int64_t tile0,
                  int64_t tile1, uint8_t* codes, float* const* params) {
    encode(layer, w, options, tile0, tile1, codes, params,
           counts_of(*layer.spec, layer.tile.cols / kAdaptiveGroup));
  };
  row.check = check;
  row.encode_batch = std::max<int64_t>(1, 4096 / width);
  adaptive_precision_fast_slots(row, current_isa());
  return {term};
}

}  // namespace rs
