#include "../codecs/ultra.h"

#include "codecs.h"
#include "loops.cuh"

namespace rs::cuda {
namespace {

// A thread owns one vector; all of them read and write the same transform.
__global__ void __launch_bounds__(kLoopThreads) table_kernel(LayerView layer, Ultra::Tables* to) {
  to->transform = *reinterpret_cast<const uint8_t*>(layer.params[Ultra::kTransform]);
  to->fill(layer.params[Ultra::kCodebook],
           static_cast<int>(blockIdx.x * kLoopThreads + threadIdx.x));
}
cudaError_t prepare(const LayerView& layer, cudaStream_t stream) {
  static_assert(Ultra::kVectors % kLoopThreads == 0);
  return run(table_kernel, Ultra::kVectors / kLoopThreads, kLoopThreads, 0, stream, layer,
             static_cast<Ultra::Tables*>(layer.tables));
}

}  // namespace

// The second term is a row of its own.
CudaRow ultra_row(const Term&) {
  CudaRow row = loop_row<Ultra>();
  row.table_bytes = sizeof(Ultra::Tables);
  row.prepare = prepare;
  return row;
}

}  // namespace rs::cuda
