#include "qat_rows.h"

#include <algorithm>
#include <vector>

#include "clones.h"

namespace rs::qat {
namespace {

// Weights taken at a time. All sums run over these lanes in one order, whatever the vector width.
constexpr int kLanes = 64;
constexpr int kSums = 16;  // partial sums of a level

struct alignas(64) Lanes {
  float at[kLanes];
};

// A block of weights on its levels.
struct Block {
  Lanes w, u, nearest, f;
  // Of gumbel: u - nearest, f - nearest, the variance of the levels; the odds and their sum.
  Lanes e, mean, spread, total, odds[kMaxLevels];
  int32_t code[kLanes];
};

#define RS_LANES for (int l = 0; l < kLanes; ++l)

inline __attribute__((always_inline)) void load(const float* from, int64_t n, Lanes& to) {
  if (n == kLanes) {
    RS_LANES to.at[l] = from[l];
  } else {
    RS_LANES to.at[l] = l < n ? from[l] : 0.0f;
  }
}

inline __attribute__((always_inline)) void find_nearest(const Settings& s, float scale, Block& b) {
  Lanes best;
  RS_LANES {
    b.u.at[l] = b.w.at[l] / scale;
    b.nearest.at[l] = s.centers[0];
    best.at[l] = std::abs(b.u.at[l] - s.centers[0]);
    b.code[l] = 0;
  }
  for (int k = 1; k < s.count; ++k) {
    const float c = s.centers[k];
    RS_LANES {
      const float d = std::abs(b.u.at[l] - c);
      const bool closer = d < best.at[l];
      best.at[l] = closer ? d : best.at[l];
      b.nearest.at[l] = closer ? c : b.nearest.at[l];
      b.code[l] = closer ? k : b.code[l];
    }
  }
}

// f, and with `Keep` what the derivatives need.
template <bool Keep>
inline __attribute__((always_inline)) void soften(const Settings& s, Block& b) {
  Lanes total, first, second;
  RS_LANES {
    b.e.at[l] = b.u.at[l] - b.nearest.at[l];
    total.at[l] = first.at[l] = second.at[l] = 0.0f;
  }
  for (int k = 0; k < s.count; ++k) {
    const float c = s.centers[k];
    RS_LANES {
      const float delta = c - b.nearest.at[l], p = odds(b.e.at[l], delta, s.inverse_tau);
      total.at[l] += p;
      first.at[l] += p * delta;
      if (Keep) second.at[l] += p * delta * delta;
      if (Keep) b.odds[k].at[l] = p;
    }
  }
  RS_LANES {
    const float mean = first.at[l] / total.at[l];
    b.f.at[l] = b.nearest.at[l] + mean;
    if (Keep) {
      b.mean.at[l] = mean;
      b.total.at[l] = total.at[l];
      b.spread.at[l] = second.at[l] / total.at[l] - mean * mean;
    }
  }
}

inline __attribute__((always_inline)) double tree(Lanes& x) {
  for (int half = kLanes / 2; half; half /= 2)
    for (int l = 0; l < half; ++l) x.at[l] += x.at[l + half];
  return x.at[0];
}

}  // namespace

RS_CLONES double quantize_row(const Settings& s, const float* w, float scale, int64_t n, float* q) {
  thread_local Block b;
  Lanes squares{};
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t live = std::min<int64_t>(kLanes, n - j);
    load(w + j, live, b.w);
    find_nearest(s, scale, b);
    if (s.mode == Mode::gumbel)
      soften<false>(s, b);
    else
      b.f = b.nearest;
    RS_LANES b.f.at[l] *= scale;
    for (int64_t l = 0; l < live; ++l) {
      const float error = b.w.at[l] - b.f.at[l];
      squares.at[l] += error * error;
    }
    if (q) std::copy_n(b.f.at, live, q + j);
  }
  return tree(squares);
}

RS_CLONES void quantize_row_backward(const Settings& s, const Range& range, const float* w,
                                     float scale, float loss, int64_t n, float* dw, float* q,
                                     RowSums& sums) {
  thread_local Block b;
  const bool soft = s.mode == Mode::gumbel;
  Lanes scales{};
  std::vector<float> levels(sums.levels && soft ? s.count * kSums : 0);
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t live = std::min<int64_t>(kLanes, n - j);
    Lanes g, level;
    load(w + j, live, b.w);
    load(dw + j, live, g);
    find_nearest(s, scale, b);
    if (soft)
      soften<true>(s, b);
    else
      b.f = b.nearest;
    Lanes scale_part;
    RS_LANES {
      const float u = b.u.at[l], f = b.f.at[l];
      const float pull = loss * (b.w.at[l] - scale * f);
      const Gradients d =
          soft ? soft_gradients(g.at[l], pull, u, f, 2.0f * s.inverse_tau * b.spread.at[l])
               : hard_gradients(g.at[l], pull, u, f, slope(u, range, s.mode), s.commitment);
      g.at[l] = d.weight;
      scale_part.at[l] = d.scale;
      level.at[l] = soft ? d.level * scale / b.total.at[l] : d.level * scale;
    }
    for (int64_t l = live; l < kLanes; ++l) scale_part.at[l] = level.at[l] = 0.0f;
    RS_LANES scales.at[l] += scale_part.at[l];
    std::copy_n(g.at, live, dw + j);
    if (q)
      for (int64_t l = 0; l < live; ++l) q[j + l] = scale * b.f.at[l];
    if (!sums.levels) continue;
    if (!soft) {
      for (int64_t l = 0; l < live; ++l) sums.levels[b.code[l]] += level.at[l];
      continue;
    }
    for (int k = 0; k < s.count; ++k) {
      const float c = s.centers[k];
      Lanes part;
      RS_LANES part.at[l] =
          level.at[l] * level_derivative(b.odds[k].at[l], b.e.at[l], c - b.nearest.at[l],
                                         b.mean.at[l], s.inverse_tau);
      float* to = levels.data() + k * kSums;
      for (int l = 0; l < kLanes; l += kSums)
        for (int i = 0; i < kSums; ++i) to[i] += part.at[l + i];
    }
  }
  sums.scale = tree(scales);
  for (size_t i = 0; i < levels.size(); ++i) sums.levels[i / kSums] += levels[i];
}

#undef RS_LANES

}  // namespace rs::qat
