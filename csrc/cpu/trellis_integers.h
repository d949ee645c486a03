// The trellis in integers: tables and activations of its product, for all instruction sets.
//
// A pair of tiles (32 columns) is summed in int32 and then flushed to float. Its 16 states a row
// give at most 16 * 8191 * (sqrt(2) * 11500 + 2) = 2.13e9 < 2^31, whatever the codes, tables and x.
#pragma once

#include "../codecs/trellis.h"
#include "integers.h"

namespace rs {

constexpr int kTrellisTop = 8191;         // of activations, 14 bits with the sign
constexpr int kTrellisRadiusTop = 11500;  // of radii; directions have 32767

// Rows of x the kernels are compiled for; a batch between two is filled up with zero rows.
constexpr int trellis_batch(int64_t m) {
  return m <= 4 ? static_cast<int>(m) : m <= 6 ? 6 : kMaxBatch;
}

// The 96 numbers all weights come from; PolarTable without its products.
struct PolarAxes {
  float radius[kTrellisRadii], cosine[kTrellisAngles], sine[kTrellisAngles];

  explicit PolarAxes(const Layer& layer) {
    std::copy_n(layer.params[0], kTrellisRadii, radius);
    for (int p = 0; p < kTrellisAngles; ++p)
      polar_direction(layer.params[1][p], &cosine[p], &sine[p]);
  }
};

// u = radius * cosine / 2^15 in units of `unit`, and so v. Directions are indexed by the sign bit
// and the phase: entry 16 + i is minus entry i.
struct TrellisIntegers {
  alignas(64) int16_t radius[kTrellisRadii] = {};
  alignas(64) int16_t cosine[2 * kTrellisAngles] = {}, sine[2 * kTrellisAngles] = {};
  float unit;

  explicit TrellisIntegers(const Layer& layer) {
    const PolarAxes table(layer);
    // Beyond 2 pi the series leaves the unit circle; the longest direction is the unit then.
    float length = 1.0f;
    bool finite = true;
    for (int p = 0; p < kTrellisAngles; ++p) {
      const float norm = std::hypot(table.cosine[p], table.sine[p]);
      finite = finite && std::isfinite(norm);
      length = std::max(length, norm);
    }
    const Quantum radii(table.radius, kTrellisRadii, kTrellisRadiusTop);
    unit = finite ? radii.unit * length * (32768.0f / 32767.0f)
                  : std::numeric_limits<float>::quiet_NaN();
    if (!std::isfinite(unit)) return;
    for (int a = 0; a < kTrellisRadii; ++a) radius[a] = radii(table.radius[a]);
    for (int p = 0; p < kTrellisAngles; ++p) {
      cosine[p] = static_cast<int16_t>(std::lrint(table.cosine[p] / length * 32767.0f));
      sine[p] = static_cast<int16_t>(std::lrint(table.sine[p] / length * 32767.0f));
      cosine[16 + p] = static_cast<int16_t>(-cosine[p]);
      sine[16 + p] = static_cast<int16_t>(-sine[p]);
    }
  }
};

// Rows of x as int16 pairs, a scale for each row and pair of tiles.
//   pairs[((pair * batch + row) * 2 + tile) * 8 + 2 * step + part]   part 0 meets u, 1 meets v
// An element is two int16, for the two states that a 32-bit lane (a row of the tile) holds at a
// step: state `half_stride / 2 * half + step_stride / 2 * step` of the row's eight.
struct TrellisActivations {
  int batch;
  int64_t pairs_of_tiles;
  Lines<int16_t> values;
  Lines<float> scale;  // [pair][row]

  TrellisActivations(const float* x, int64_t m, int64_t in, int half_stride, int step_stride)
      : batch(trellis_batch(m)),
        pairs_of_tiles((in + 31) / 32),
        values(pairs_of_tiles * batch * 32),
        scale(pairs_of_tiles * batch) {
    for (int64_t p = 0; p < pairs_of_tiles; ++p) {
      for (int64_t b = 0; b < m; ++b) {
        const float* from = x + b * in + p * 32;
        const int tiles = in - p * 32 >= 32 ? 2 : 1;
        const Quantum quantum(from, tiles * 16, kTrellisTop);
        scale[p * batch + b] = quantum.unit;
        for (int t = 0; t < tiles; ++t) {
          int16_t q[16];
          for (int i = 0; i < 16; ++i) q[i] = quantum(from[t * 16 + i]);
          int16_t* to = values.get() + ((p * batch + b) * 2 + t) * 16;
          for (int i = 0; i < 16; ++i)  // i = (step, part, half)
            to[i] = q[(i & 1) * half_stride + (i >> 2) * step_stride + (i >> 1 & 1)];
        }
      }
    }
  }
};

}  // namespace rs
