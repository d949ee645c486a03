#include "../codecs/trellis.h"

#include "codecs.h"
#include "encode_slots.h"
#include "loops.cuh"

namespace rs::cuda {
namespace {

// One block: sixteen threads turn the angles, then each thread owns entries of the table.
__global__ void __launch_bounds__(kLoopThreads) table_kernel(LayerView layer, PolarTable* table) {
  const float *radius = layer.params[0], *angle = layer.params[1];
  const int i = threadIdx.x;
  if (i < kTrellisRadii) table->radius[i] = radius[i];
  if (i < kTrellisAngles) polar_direction(angle[i], &table->cosine[i], &table->sine[i]);
  __syncthreads();
  for (int e = i; e < kTrellisRadii * kTrellisAngles; e += kLoopThreads) {
    table->u[e] = mul(radius[e % kTrellisRadii], table->cosine[e / kTrellisRadii]);
    table->v[e] = mul(radius[e % kTrellisRadii], table->sine[e / kTrellisRadii]);
  }
}

cudaError_t prepare(const LayerView& layer, cudaStream_t stream) {
  return run(table_kernel, 1, kLoopThreads, 0, stream, layer,
             static_cast<PolarTable*>(layer.tables));
}

template <int K>
CudaRow row_of(int k) {
  if (k == K) {
    CudaRow row = loop_row<Trellis<K>>();
    row.table_bytes = sizeof(PolarTable);
    row.prepare = prepare;
    return row;
  }
  if constexpr (K < 8) return row_of<K + 1>(k);
  return {};
}

}  // namespace

CudaRow trellis_row(const Term& term) {
  CudaRow row = row_of<3>(static_cast<int>(2 * term.spec.number("bits", 2)));
  trellis_encode_slots(row, term);
  return row;
}

}  // namespace rs::cuda
