#include "../codecs/block_sparse.h"

#include "codecs.h"
#include "loops.cuh"

namespace rs::cuda {
namespace {

using Patterns = SquareSparse<false>;

// One block, a thread owns one pattern.
__global__ void __launch_bounds__(256) pattern_kernel(LayerView layer, Patterns::Tables* tables) {
  const int i = threadIdx.x;
  tables->masks[i] = Patterns::Tables::pattern(layer.params[Patterns::kMasks], i);
  if (i == 0) tables->scale = *layer.params[Patterns::kScale];
}
cudaError_t prepare_patterns(const LayerView& layer, cudaStream_t stream) {
  return run(pattern_kernel, 1, 256, 0, stream, layer,
             static_cast<Patterns::Tables*>(layer.tables));
}

// Its cosines are in LayerView::tables.
struct DeviceRowSparse : RowSparse {
  struct Tables {
    float scale;
    const Cosines& cosine;
    RS_HD explicit Tables(const LayerView& layer)
        : scale(*layer.params[0]), cosine(*static_cast<const Cosines*>(layer.tables)) {}
  };
};

// One block, a thread owns one phase.
__global__ void __launch_bounds__(256) phase_kernel(RowSparse::Cosines* table) {
  for (int j = 0; j < 8; ++j) table->at[threadIdx.x][j] = RowSparse::Cosines::of(threadIdx.x, j);
}
cudaError_t prepare_phases(const LayerView& layer, cudaStream_t stream) {
  return run(phase_kernel, 1, 256, 0, stream, static_cast<RowSparse::Cosines*>(layer.tables));
}

}  // namespace

CudaRow block_sparse_row(const Term& term) {
  if (term.spec.flag("mask16", false)) return loop_row<SquareSparse<true>>();
  if (term.spec.word("layout", "square") == "square") {
    CudaRow row = loop_row<Patterns>();
    row.table_bytes = sizeof(Patterns::Tables);
    row.prepare = prepare_patterns;
    return row;
  }
  CudaRow row = loop_row<DeviceRowSparse>();
  row.table_bytes = sizeof(RowSparse::Cosines);
  row.prepare = prepare_phases;
  return row;
}

}  // namespace rs::cuda
