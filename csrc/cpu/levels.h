// A layer whose few levels all lie near bfloat16 numbers.
#pragma once

#include <bit>
#include <cmath>
#include <functional>
#include <numeric>
#include <vector>

#include "../codec.h"
#include "half.h"

namespace rs {

// The factor in [1, 2) that n levels are to be multiplied by to lose least when rounded to
// bfloat16.
inline float level_factor(const float* levels, int64_t n) {
  constexpr int kFactors = 128;
  float best = 1, least = INFINITY;
  for (int f = 0; f < kFactors; ++f) {
    const float factor = 1 + static_cast<float>(f) / kFactors;
    float error = 0, power = 0;
    for (int64_t i = 0; i < n; ++i) {
      const float level = levels[i] * factor;
      const float miss = std::bit_cast<float>(uint32_t{to_bf16(level)} << 16) - level;
      error += miss * miss, power += level * level;
    }
    if (error < least * power) least = error / power, best = factor;
  }
  return best;
}

// The layer with levels multiplied and output scales divided by that factor, where its row has
// levels: many weights share few roundings, so that chance may leave an error half above the usual.
struct FittedLevels {
  Layer layer;
  std::vector<float> levels, scale;

  FittedLevels(const Row& row, const Layer& given, bool wanted) : layer(given) {
    if (!wanted || row.levels < 0) return;
    levels = copy(row, given, row.levels);
    scale = copy(row, given, row.out_scale);
    const float factor = level_factor(levels.data(), static_cast<int64_t>(levels.size()));
    for (float& level : levels) level *= factor;
    for (float& s : scale) s /= factor;
    layer.params[static_cast<size_t>(row.levels)] = levels.data();
    layer.params[static_cast<size_t>(row.out_scale)] = scale.data();
  }
  FittedLevels(const FittedLevels&) = delete;

 private:
  static std::vector<float> copy(const Row& row, const Layer& layer, int index) {
    const auto i = static_cast<size_t>(index);
    const auto& sizes = row.params[i].sizes;
    const int64_t n =
        std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<int64_t>());
    return {layer.params[i], layer.params[i] + n};
  }
};

}  // namespace rs
