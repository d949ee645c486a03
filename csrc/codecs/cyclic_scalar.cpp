#include "cyclic_scalar.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "../cpu/clones.h"
#include "../cpu/fast.h"
#include "../cpu/half.h"
#include "../trig.h"
#include "nearest.h"

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

constexpr int64_t kLanes = 16;  // partial sums, so that every instruction set adds in one order

struct ValueCode {
  float value;  // at scale 1
  uint16_t code;
};

// The distinct values of a code in rising order.
template <int Bits>
std::vector<ValueCode> all_values() {
  std::vector<ValueCode> all;
  for (uint32_t code = 0; code < CyclicScalar<Bits>::kCodes; ++code)
    all.push_back(
        {level_table<Bits>()[code] * CyclicScalar<Bits>::kLevelUnit, static_cast<uint16_t>(code)});
  std::stable_sort(all.begin(), all.end(),
                   [](const ValueCode& a, const ValueCode& b) { return a.value < b.value; });
  all.erase(std::unique(all.begin(), all.end(),
                        [](const ValueCode& a, const ValueCode& b) { return a.value == b.value; }),
            all.end());
  return all;
}

template <int Bits>
struct Values {
  static constexpr int kCells = Bits == 8 ? 508 : 1 << 14;
  std::vector<ValueCode> all = all_values<Bits>();
  Nearest nearest{numbers(), kCells};
  std::vector<float> coarse;  // for each cell of [-1, 1] the value nearest to its middle

  Values() {
    for (int cell = 0; cell <= kCells; ++cell) {
      const float middle = (static_cast<float>(cell) + 0.5f) * (2.0f / kCells) - 1.0f;
      coarse.push_back(nearest[nearest.find(middle)]);
    }
  }
  uint16_t code(float x) const { return all[nearest.find(x)].code; }
  static const Values& get() {
    static const Values values;
    return values;
  }

 private:
  std::vector<float> numbers() const {
    std::vector<float> values;
    for (const ValueCode& v : all) values.push_back(v.value);
    return values;
  }
};

// A group's weights times 2^-exponent, near one, so that their squares are numbers too; padded to
// whole lanes with importance 0.
struct Group {
  std::vector<float> w, h;
  float peak = 0;
  int exponent = 0;

  void load(const float* weights, const float* importance, int64_t n) {
    w.assign(static_cast<size_t>(round_up(n, kLanes)), 0.0f);
    h.assign(w.size(), 0.0f);
    peak = 0;
    for (int64_t i = 0; i < n; ++i) peak = std::max(peak, std::abs(weights[i]));
    exponent = peak == 0 ? 0 : std::ilogb(peak);
    peak = std::ldexp(peak, -exponent);
    for (int64_t i = 0; i < n; ++i) {
      w[static_cast<size_t>(i)] = std::ldexp(weights[i], -exponent);
      h[static_cast<size_t>(i)] = importance ? importance[i] : 1.0f;
    }
  }
};

// Sums over a group of h q w, h q^2 and h (w - scale q)^2, q being the coarse value of w / scale.
RS_CLONES void sum_moments(const float* w, const float* h, int64_t n, float scale, float inverse,
                           const float* coarse, float cells, float (*sums)[kLanes]) {
  float cross[kLanes] = {}, power[kLanes] = {}, error[kLanes] = {};
  for (int64_t i = 0; i < n; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) {
      const float x = w[i + j], u = x * inverse;
      const float low = u > -1.0f ? u : -1.0f, held = low < 1.0f ? low : 1.0f;
      const float q = coarse[static_cast<int32_t>((held + 1.0f) * (0.5f * cells))];
      const float hq = h[i + j] * q, miss = x - scale * q;
      cross[j] += hq * x;
      power[j] += hq * q;
      error[j] += h[i + j] * (miss * miss);
    }
  for (int64_t j = 0; j < kLanes; ++j) {
    sums[0][j] = cross[j];
    sums[1][j] = power[j];
    sums[2][j] = error[j];
  }
}

// What the values nearest at one scale say of it: the error, and the scale that is best for them.
struct Trial {
  float scale = 0, refit = 0;
  double error = 0;
};

template <int Bits>
Trial attempt(const Group& g, float scale) {
  const auto& values = Values<Bits>::get();
  float sums[3][kLanes];
  sum_moments(g.w.data(), g.h.data(), static_cast<int64_t>(g.w.size()), scale, 1.0f / scale,
              values.coarse.data(), Values<Bits>::kCells, sums);
  double total[3] = {};
  for (int s = 0; s < 3; ++s)
    for (float lane : sums[s]) total[s] += lane;
  const double best = total[1] > 0 ? total[0] / total[1] : scale;
  return {scale, round_to_half(static_cast<float>(best)), total[2]};
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
      const uint32_t code = values.code(group.w[static_cast<size_t>(j)] * inverse);
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
