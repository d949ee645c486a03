#include "../codecs/cyclic_scalar.h"

#include "codecs.h"
#include "loops.cuh"
#include "tables.h"

namespace rs::cuda {
namespace {

template <int Bits, int Unit>
struct ScalarUnits {
  static constexpr int kUnit = Unit, kSums = 0;
  using Code = CyclicScalar<Bits>;

  struct Tables {
    const float *scale, *cosine;
    int64_t groups;
    RS_HD explicit Tables(const LayerView& layer)
        : scale(layer.params[0]),
          cosine(static_cast<const float*>(layer.tables)),
          groups(layer.tile_cols()) {}
  };

  RS_HD static float level(const uint8_t* tile, int j, const Tables& t) {
    if constexpr (Bits == 8) return Code::level(tile[j], t.cosine);
    return Code::level(tile[2 * j] | static_cast<uint32_t>(tile[2 * j + 1]) << 8, t.cosine);
  }
  RS_HD static void decode(const uint8_t* tile, int64_t row, int64_t col, int unit, const Tables& t,
                           float* w) {
    const float step = Code::step(t.scale[row * t.groups + col]);
    for (int k = 0; k < Unit; ++k) w[k] = mul(level(tile, unit * Unit + k, t), step);
  }
  template <class Sums>
  RS_HD static void adjoint(const uint8_t* tile, int64_t row, int64_t col, int unit,
                            const Tables& t, const float* dw, Sums& sums) {
    float sum = 0;
    for (int k = 0; k < Unit; ++k) sum += level(tile, unit * Unit + k, t) * dw[k];
    sums.own(0, row * t.groups + col, sum * Code::kLevelUnit);
  }
};

cudaError_t prepare(const LayerView& layer, cudaStream_t stream) {
  return turn_cosines(static_cast<float*>(layer.tables), stream);
}

template <int Bits>
CudaRow row_of(int64_t group) {
  CudaRow row = group % 8 ? loop_row<ScalarUnits<Bits, 1>>() : loop_row<ScalarUnits<Bits, 8>>();
  if (Bits == 16) {
    row.table_bytes = kTurn * sizeof(float);
    row.prepare = prepare;
  }
  return row;
}

}  // namespace

CudaRow cyclic_scalar_row(const Term& term) {
  return term.spec.number("bits", 8) == 8 ? row_of<8>(term.row.tile.cols)
                                          : row_of<16>(term.row.tile.cols);
}

}  // namespace rs::cuda
