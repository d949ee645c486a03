#include "hierarchical.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "../cpu/clones.h"
#include "../cpu/fast.h"
#include "../cpu/loops.h"
#include "../cpu/strips.h"
#include "hierarchical_xor.h"

namespace rs {
namespace {

constexpr int kBlock = kHierarchicalBlock;
constexpr int kLanes = 32;  // groups searched at once

// Groups of eight weights by position, with their importance; lanes without a group hold zeros.
struct Groups {
  alignas(64) float w[kBlock][kLanes] = {}, h[kBlock][kLanes] = {};
};

// The multipliers in rising order and the middles between them.
struct Multipliers {
  std::array<float, 4> value;
  std::array<float, 3> middle;

  explicit Multipliers(const float* m) {
    for (int i = 0; i < 4; ++i) value[i] = std::isfinite(m[i]) ? m[i] : 0.0f;
    std::sort(value.begin(), value.end());
    for (int i = 0; i < 3; ++i) middle[i] = 0.5f * value[i] + 0.5f * value[i + 1];
  }
};

// The base and deltas of least squared error, exactly: for a base b weight i takes the multiplier
// nearest to w_i / b, which changes only where w_i / b meets a middle. Between two such borders the
// choice of all eight is fixed and its best base is sum h w m / sum h m^2, which takes
// (sum h w m)^2 / sum h m^2 off the error. So one trial just beyond each border (farther from
// zero), and one beside zero on either side, sees every choice.
RS_CLONES void best_bases(const Groups& g, const Multipliers& m, float* base) {
  constexpr int kTrials = kBlock * 3 + 2;
  constexpr float kBeyond = 1.0f - 0x1p-20f;  // times 1/b
  float most[kLanes];
  for (int l = 0; l < kLanes; ++l) most[l] = 0, base[l] = 0;
  const float m0 = m.value[0], m1 = m.value[1], m2 = m.value[2], m3 = m.value[3];
  const float t0 = m.middle[0], t1 = m.middle[1], t2 = m.middle[2];
  for (int trial = 0; trial < kTrials; ++trial) {
    float inverse[kLanes], dot[kLanes], power[kLanes];
    const bool beside_zero = trial >= kBlock * 3;
    const float border = beside_zero ? 0.0f : m.middle[trial % 3] * kBeyond;
    const float limit = trial % 2 ? 1e30f : -1e30f;
    const float* w = g.w[beside_zero ? 0 : trial / 3];
    for (int l = 0; l < kLanes; ++l) {
      inverse[l] = beside_zero ? limit : border / w[l];
      dot[l] = 0, power[l] = 0;
    }
    for (int k = 0; k < kBlock; ++k)
      for (int l = 0; l < kLanes; ++l) {
        const float u = g.w[k][l] * inverse[l];
        float chosen = u > t0 ? m1 : m0;
        chosen = u > t1 ? m2 : chosen;
        chosen = u > t2 ? m3 : chosen;
        const float hm = g.h[k][l] * chosen;
        dot[l] += hm * g.w[k][l];
        power[l] += hm * chosen;
      }
    for (int l = 0; l < kLanes; ++l) {
      const float b = dot[l] / power[l], gain = dot[l] * b;
      const bool better = gain > most[l];
      most[l] = better ? gain : most[l];
      base[l] = better ? b : base[l];
    }
  }
}

// Bases to integers, and the nearest multiplier of every weight.
RS_CLONES void quantize(const Groups& g, const float* m, const float* base, int32_t* integer,
                        int32_t* deltas) {
  float held[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    const float scaled = std::min(std::max(base[l] * 512.0f, -32767.0f), 32767.0f);
    integer[l] = static_cast<int32_t>(scaled + (scaled < 0 ? -0.5f : 0.5f));
    held[l] = static_cast<float>(integer[l]) * (1.0f / 512);
    deltas[l] = 0;
  }
  for (int k = 0; k < kBlock; ++k)
    for (int l = 0; l < kLanes; ++l) {
      float least = std::abs(g.w[k][l] - held[l] * m[0]);
      int32_t delta = 0;
      for (int32_t d = 1; d < 4; ++d) {
        const float miss = std::abs(g.w[k][l] - held[l] * m[d]);
        delta = miss < least ? d : delta;
        least = miss < least ? miss : least;
      }
      deltas[l] |= delta << (2 * k);
    }
}

void put16(uint8_t* to, uint32_t value) {
  to[0] = static_cast<uint8_t>(value);
  to[1] = static_cast<uint8_t>(value >> 8);
}

void encode_mul(const Layer& layer, const float* w, const EncodeOptions& options, int64_t tile0,
                int64_t tile1, uint8_t* codes, float* const*) {
  const float* m = layer.params[0];
  const Multipliers sorted(m);
  float base[kLanes];
  int32_t integer[kLanes], deltas[kLanes];
  for_each_strip(layer, w, options, tile0, tile1,
                 [&](int64_t tile, int64_t count, const float* strip, const float* h) {
                   for (int64_t first = 0; first < count; first += kLanes) {
                     const int64_t n = std::min<int64_t>(kLanes, count - first);
                     Groups g;
                     for (int64_t l = 0; l < n; ++l)
                       for (int k = 0; k < kBlock; ++k) {
                         g.w[k][l] = strip[(first + l) * kBlock + k];
                         g.h[k][l] = h[(first + l) * kBlock + k];
                       }
                     best_bases(g, sorted, base);
                     quantize(g, m, base, integer, deltas);
                     for (int64_t l = 0; l < n; ++l) {
                       uint8_t* to = codes + (tile + first + l) * 4;
                       put16(to, static_cast<uint32_t>(integer[l]));
                       put16(to + 2, static_cast<uint32_t>(deltas[l]));
                     }
                   }
                 });
}

uint32_t nearest_deltas(const float* w, uint32_t base, const float* levels) {
  float value[4];
  for (uint32_t d = 0; d < 4; ++d)
    value[d] = XorMode::factor(base, d) * levels[XorMode::entry(base, d)];
  uint32_t deltas = 0;
  for (int i = 0; i < kBlock; ++i) {
    float least = std::abs(w[i] - value[0]);
    uint32_t best = 0;
    for (uint32_t d = 1; d < 4; ++d) {
      const float miss = std::abs(w[i] - value[d]);
      best = miss < least ? d : best;
      least = miss < least ? miss : least;
    }
    deltas |= best << (2 * i);
  }
  return deltas;
}

void encode_xor(const Layer& layer, const float* w, const EncodeOptions& options, int64_t tile0,
                int64_t tile1, uint8_t* codes, float* const*) {
  const float* levels = layer.params[0];
  const auto search = XorSearch::with(levels);
  for_each_strip(layer, w, options, tile0, tile1,
                 [&](int64_t tile, int64_t count, const float* strip, const float* h) {
                   for (int64_t i = 0; i < count; ++i) {
                     const float* own = strip + i * kBlock;
                     const uint32_t base = search->run(own, h + i * kBlock);
                     put16(codes + (tile + i) * 4, base);
                     put16(codes + (tile + i) * 4 + 2, nearest_deltas(own, base, levels));
                   }
                 });
}

template <class Mode>
void fill(Row& row) {
  row.decode = decode_loop<Hierarchical<Mode>>;
  row.adjoint = adjoint_loop<Hierarchical<Mode>>;
}

}  // namespace

std::vector<Term> hierarchical_terms(const Spec& spec, Shape shape) {
  spec.only({"mode", "fitted"});
  const std::string mode = spec.word("mode", "mul");
  if (mode != "mul" && mode != "xor")
    throw std::invalid_argument("hierarchical: mode must be mul or xor, got '" + mode + "'");
  spec.flag("fitted", true);  // a matter of the encoder in Python
  Term term;
  Row& row = term.row;
  row.name = "hierarchical";
  row.tile = {1, kBlock, 4};
  if (mode == "mul") {
    row.params.push_back({"multipliers", Axis::shared, {MulMode::kEntries}});
    fill<MulMode>(row);
    row.encode = encode_mul;
  } else {
    row.params.push_back({"levels", Axis::shared, {XorMode::kEntries}});
    fill<XorMode>(row);
    row.encode = encode_xor;
  }
  row.params.push_back({"out_scale", Axis::out, {shape.out}});
  row.out_scale = 1;
  row.encode_batch = 512;
  hierarchical_fast_slots(row, mode == "xor", current_isa());
  return {term};
}

}  // namespace rs
