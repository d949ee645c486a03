#include "cyclic_scalar.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "../cpu/fast.h"
#include "../cpu/half.h"
#include "../trig.h"

namespace rs {
namespace {

template <int Bits>
uint32_t code_at(const uint8_t* tile, int64_t j) {
  if constexpr (Bits == 8) return tile[j];
  return tile[2 * j] | static_cast<uint32_t>(tile[2 * j + 1]) << 8;
}

template <int Bits>
std::vector<float> all_levels() {
  std::vector<float> levels(CyclicScalar<Bits>::kCodes);
  for (uint32_t code = 0; code < levels.size(); ++code)
    levels[code] = CyclicScalar<Bits>::level(code, cyclic_cosines());
  return levels;
}
// Indexed by the code: 1 KB or 256 KB.
template <int Bits>
const float* level_table() {
  static const std::vector<float> levels = all_levels<Bits>();
  return levels.data();
}

template <int Bits>
void decode(const Layer& layer, int64_t row0, int64_t row1, float* w) {
  const float* level = level_table<Bits>();
  const int64_t n = layer.tile_cols(), group = layer.tile.cols;
  for (int64_t t = row0 * n; t < row1 * n; ++t, w += group) {
    const uint8_t* tile = layer.codes + t * layer.tile.bytes;
    const float step = CyclicScalar<Bits>::step(layer.params[0][t]);
    for (int64_t j = 0; j < group; ++j) w[j] = mul(level[code_at<Bits>(tile, j)], step);
  }
}

template <int Bits>
void adjoint(const Layer& layer, int64_t row0, int64_t row1, const float* dw, float* const* grads) {
  if (!grads[0]) return;
  const float* level = level_table<Bits>();
  const int64_t n = layer.tile_cols(), group = layer.tile.cols;
  for (int64_t t = row0 * n; t < row1 * n; ++t, dw += group) {
    const uint8_t* tile = layer.codes + t * layer.tile.bytes;
    float sum = 0;
    for (int64_t j = 0; j < group; ++j) sum += level[code_at<Bits>(tile, j)] * dw[j];
    grads[0][t] += sum * CyclicScalar<Bits>::kLevelUnit;
  }
}

// The distinct values of a code at scale 1 in rising order, and the nearest of them. A grid of
// cells holds where to begin to look.
template <int Bits>
struct Values {
  static constexpr int kCells = Bits == 8 ? 508 : 1 << 15;  // of [-1, 1]
  std::vector<float> value, middle;                         // middle: between neighbours
  std::vector<uint16_t> code, begin;

  Values() {
    const float* level = level_table<Bits>();
    std::vector<uint32_t> order(CyclicScalar<Bits>::kCodes);
    for (uint32_t i = 0; i < order.size(); ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(),
                     [&](uint32_t a, uint32_t b) { return level[a] < level[b]; });
    for (uint32_t c : order) {
      const float v = level[c] * CyclicScalar<Bits>::kLevelUnit;
      if (!value.empty() && v == value.back()) continue;
      if (!value.empty()) middle.push_back(0.5f * (value.back() + v));
      value.push_back(v);
      code.push_back(static_cast<uint16_t>(c));
    }
    middle.push_back(2);  // beyond any argument of nearest
    for (int cell = 0; cell <= kCells; ++cell) {
      const double edge = 2.0 * cell / kCells - 1 - 1e-6;
      begin.push_back(static_cast<uint16_t>(
          std::lower_bound(middle.begin(), middle.end(), static_cast<float>(edge)) -
          middle.begin()));
    }
  }
  size_t nearest(float x) const {
    const float held = std::min(std::max(x, -1.0f), 1.0f);
    size_t at = begin[static_cast<size_t>((held + 1.0f) * (0.5f * kCells))];
    while (middle[at] < held) ++at;
    return at;
  }
  static const Values& get() {
    static const Values values;
    return values;
  }
};

// A group's weights times 2^-exponent, near one, so that their squares are numbers too.
struct Group {
  std::vector<float> w, h;
  double energy = 0;
  float peak = 0;
  int exponent = 0;

  void load(const float* weights, const float* importance, int64_t n) {
    w.assign(weights, weights + n);
    if (importance)
      h.assign(importance, importance + n);
    else
      h.assign(static_cast<size_t>(n), 1.0f);
    peak = 0;
    for (float x : w) peak = std::max(peak, std::abs(x));
    exponent = peak == 0 ? 0 : std::ilogb(peak);
    peak = std::ldexp(peak, -exponent);
    energy = 0;
    for (size_t i = 0; i < w.size(); ++i) {
      w[i] = std::ldexp(w[i], -exponent);
      energy += double{h[i]} * w[i] * w[i];
    }
  }
};

// What the nearest values at one scale say of it: the error, and the scale that is best for them.
struct Trial {
  float scale = 0, refit = 0;
  double error = 0;
};

template <int Bits>
Trial attempt(const Group& g, float scale) {
  const auto& values = Values<Bits>::get();
  const float inverse = 1.0f / scale;
  double cross = 0, power = 0;
  for (size_t i = 0; i < g.w.size(); ++i) {
    const float q = values.value[values.nearest(g.w[i] * inverse)], hq = g.h[i] * q;
    cross += double{hq} * g.w[i];
    power += double{hq} * q;
  }
  const double error = g.energy - scale * (2 * cross - scale * power);
  return {scale, power > 0 ? round_to_half(static_cast<float>(cross / power)) : scale, error};
}

// Clipping ranges of either sign (the 8-bit values are denser above zero), the best few polished by
// refits until the error stops falling.
template <int Bits>
float fit_scale(const Group& g) {
  if (g.peak == 0) return 0;
  constexpr int kRanges = Bits == 8 ? 13 : 8, kPolished = Bits == 8 ? 4 : 2;
  constexpr float kLeast = Bits == 8 ? 0.7f : 0.98f, kStride = Bits == 8 ? 0.04f : 0.02f;
  std::array<Trial, 2 * kRanges> found;
  size_t count = 0;
  for (int side = 0; side < (Bits == 8 ? 2 : 1); ++side)
    for (int i = 0; i < kRanges; ++i) {
      const float scale = round_to_half((kLeast + kStride * i) * g.peak);
      found[count++] = attempt<Bits>(g, side ? -scale : scale);
    }
  std::stable_sort(found.begin(), found.begin() + count,
                   [](const Trial& a, const Trial& b) { return a.error < b.error; });
  Trial best = found[0];
  for (int c = 0; c < kPolished; ++c) {
    Trial now = found[c];
    for (int round = 0; round < 6 && now.refit != now.scale && now.refit != 0; ++round) {
      const Trial next = attempt<Bits>(g, now.refit);
      if (!(next.error < now.error)) break;
      now = next;
    }
    if (now.error < best.error) best = now;
  }
  return best.scale;
}

template <int Bits>
void encode(const Layer& layer, const float* w, const EncodeOptions& options, int64_t tile0,
            int64_t tile1, uint8_t* codes, float* const* params) {
  const auto& values = Values<Bits>::get();
  const int64_t n = layer.tile_cols(), width = layer.tile.cols;
  Group group;
  for (int64_t t = tile0; t < tile1; ++t) {
    const int64_t column = t % n * width;
    group.load(w + t / n * layer.in + column,
               options.importance ? options.importance + column : nullptr, width);
    const float scale = fit_scale<Bits>(group), inverse = scale != 0 ? 1.0f / scale : 0.0f;
    params[0][t] = std::ldexp(scale, group.exponent);
    uint8_t* tile = codes + t * layer.tile.bytes;
    for (int64_t j = 0; j < width; ++j) {
      const uint32_t code = values.code[values.nearest(group.w[static_cast<size_t>(j)] * inverse)];
      tile[j * (Bits / 8)] = static_cast<uint8_t>(code);
      if constexpr (Bits == 16) tile[2 * j + 1] = static_cast<uint8_t>(code >> 8);
    }
  }
}

template <int Bits>
void fill(Row& row) {
  row.decode = decode<Bits>;
  row.adjoint = adjoint<Bits>;
  row.encode = encode<Bits>;
}

}  // namespace

const float* cyclic_cosines() {
  static const auto table = [] {
    std::array<float, 256> c;
    for (unsigned k = 0; k < c.size(); ++k) c[k] = static_cast<float>(turn_cosine(k, c.size()));
    return c;
  }();
  return table.data();
}

std::vector<Term> cyclic_scalar_terms(const Spec& spec, Shape shape) {
  spec.only({"bits", "group"});
  const double bits = spec.number("bits", 8), wanted = spec.number("group", 64);
  if (bits != 8 && bits != 16)
    throw std::invalid_argument("cyclic_scalar: bits must be 8 or 16, got " +
                                spec.word("bits", ""));
  if (wanted != std::floor(wanted) || wanted < 1 || wanted > (1 << 20))
    throw std::invalid_argument(
        "cyclic_scalar: group must be a whole number from 1 to 1048576, got " +
        spec.word("group", ""));
  const auto group = static_cast<int64_t>(wanted);
  Term term;
  Row& row = term.row;
  row.name = "cyclic_scalar";
  row.tile = {1, group, group * static_cast<int64_t>(bits) / 8};
  row.params.push_back({"scale", Axis::both, {shape.out, round_up(shape.in, group) / group}});
  row.encode_batch = std::max<int64_t>(1, 4096 / group);
  if (bits == 8)
    fill<8>(row);
  else
    fill<16>(row);
  cyclic_scalar_fast_slots(row, static_cast<int>(bits), group, current_isa());
  return {term};
}

}  // namespace rs
