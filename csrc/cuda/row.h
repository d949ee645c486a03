// The slots of a codec on the device: the counterpart of rs::Row. All of them only enqueue on the
// stream; pointers are the device's. Everything around them (frames, slices, products, sums over
// terms) is in linear.cpp and params.cpp, once for all codecs.
#pragma once

#include "types.h"

namespace rs::cuda {

// Shared memory of a block that `linear` and `grad_input` may ask for: what sm_80 has. On a device
// with less, products go through decoded slices.
constexpr int kProductShared = 163 << 10;

struct CudaRow {
  // Bytes of `LayerView::tables`, and what fills them; 0 for codecs that decode from params alone.
  int64_t table_bytes = 0;
  cudaError_t (*prepare)(const LayerView&, cudaStream_t) = nullptr;

  // Tiles of T into w, rows `stride` apart, whose first value is the range's. float32 is bit-exact.
  cudaError_t (*decode)(const LayerView&, TileRange, void* w, int64_t stride, Type,
                        cudaStream_t) = nullptr;

  // Adds the gradient of every param to grads[kMostParams], given dw = dLoss/dT of tile rows
  // [row0, row1), float32, rows layer.in apart. A null grads[i] is not wanted. Gradients of params
  // that all tiles share gather in `sums`, `sum_bytes` zeroed before the first call, until `finish`
  // adds them. `largest`: the largest |dw|, one float on the device.
  int64_t sum_bytes = 0;
  cudaError_t (*adjoint)(const LayerView&, int64_t row0, int64_t row1, const float* dw,
                         const float* largest, void* sums, float* const* grads,
                         cudaStream_t) = nullptr;
  cudaError_t (*finish)(const LayerView&, const void* sums, float* const* grads,
                        cudaStream_t) = nullptr;

  // y (m, out) float32 = x (m, in) @ T^T straight from the codes for m <= linear_max_m, x in
  // bfloat16 or float16. Optional. `scratch`: linear_scratch(layer, m) bytes.
  cudaError_t (*linear)(const LayerView&, const void* x, Type, int64_t m, float* y, void* scratch,
                        cudaStream_t) = nullptr;
  int64_t (*linear_scratch)(const LayerView&, int64_t m) = nullptr;
  int64_t linear_max_m = 0;

  // dx (m, in) float32 = dy (m, out) @ T straight from the codes, likewise.
  cudaError_t (*grad_input)(const LayerView&, const void* dy, Type, int64_t m, float* dx,
                            void* scratch, cudaStream_t) = nullptr;
  int64_t (*grad_input_scratch)(const LayerView&, int64_t m) = nullptr;
  int64_t grad_input_max_m = 0;

  // Both products take float32 instead, for settings that name an arithmetic of their own.
  bool takes_float = false;

  // Codes (zeroed) of all tiles for the target w (out, in) float32, and the params that the codec
  // fits per tile. `importance` (in,) or null. Null: encoding is a search on the host.
  cudaError_t (*encode)(const LayerView&, const float* w, const float* importance, uint8_t* codes,
                        float* const* params, void* scratch, cudaStream_t) = nullptr;
  int64_t (*encode_scratch)(const LayerView&) = nullptr;
};

// The slots of a resolved term, kept with it; `decode` is null where the codec has none.
inline const CudaRow& cuda_row(const Term& term) {
  return *static_cast<const CudaRow*>(term.device.get());
}

}  // namespace rs::cuda
