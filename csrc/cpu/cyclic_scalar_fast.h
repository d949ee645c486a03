// Products of scalar cyclic codes by steps of a row's codes.
#pragma once

#include "../codecs/cyclic_scalar.h"
#include "fast.h"
#include "lanes.h"

namespace rs {

// Activations by steps of so many columns: values[(column / step * batch + row) * step + place].
struct StepActivations {
  int batch;
  Lines<int16_t> values;
  float unit[kMaxBatch];

  // apart: the even columns of a step before the odd ones.
  StepActivations(const float* x, int64_t m, int64_t in, int64_t step, bool apart)
      : batch(static_cast<int>(std::bit_ceil(static_cast<uint64_t>(m)))), values(in * batch) {
    for (int64_t b = 0; b < m; ++b) {
      const Quantum quantum(x + b * in, in, 32767);
      unit[b] = quantum.unit;
      for (int64_t j = 0; j < in; ++j) {
        const int64_t place = apart ? j % 2 * (step / 2) + j % step / 2 : j % step;
        values[(j / step * batch + b) * step + place] = quantum(x[b * in + j]);
      }
    }
  }
};

using StepKernel = void (*)(const Layer&, const StepActivations&, int64_t m, float* y, int64_t row0,
                            int64_t row1);

// By the kernels for 1, 2, 4 and 8 rows of x.
inline void step_linear(const Layer& layer, const float* x, int64_t m, float* y, int64_t step,
                        bool apart, const StepKernel (&kernels)[4]) {
  const StepActivations values(x, m, layer.in, step, apart);
  const StepKernel kernel = kernels[std::bit_width(static_cast<uint64_t>(values.batch - 1))];
  parallel_for(layer.out, row_grain(layer.out, layer.in),
               [&](int64_t begin, int64_t end) { kernel(layer, values, m, y, begin, end); });
}

template <int Bits>
void fill_step_linear(Row& row, void (*linear)(const Layer&, const float*, int64_t, float*)) {
  row.linear = linear;
  row.linear_max_m = kMaxBatch;
  row.linear_type = Bits == 8 ? "integer levels, 16-bit activations per row"
                              : "14-bit weights, 16-bit activations per row";
}

}  // namespace rs
