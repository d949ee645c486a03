#include "layers.h"

#include <numeric>

#include "codecs.h"
#include "frame.h"

namespace rs::cuda {

namespace {

std::shared_ptr<const void> make_row(const Term& term) {
  CudaRow row;
  for (const CudaEntry& entry : kCudaRows)
    if (term.row.name == entry.name) row = entry.row(term);
  return std::make_shared<const CudaRow>(row);
}
[[maybe_unused]] const bool rows_are_kept = (device_row = make_row, true);

bool has_product_memory(const at::Tensor& like) {
  int bytes = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                        std::max<int>(0, like.get_device())));
  return bytes >= kProductShared;
}

}  // namespace

int64_t DeviceTerm::unit() const { return std::lcm(row->tile.rows, row->out_block); }

int64_t DeviceTerm::slice_rows(int64_t weights) const {
  const int64_t units = std::max<int64_t>(1, weights / std::max<int64_t>(1, layer.in * unit()));
  return std::min(layer.out, units * unit());
}

void DeviceTerm::decode(int64_t row0, int64_t row1, const at::Tensor& w) const {
  const TileRange range{row0 / layer.tile.rows, row1 / layer.tile.rows, 0, layer.tile_cols()};
  launch(codes, [&](cudaStream_t stream) {
    return cuda.decode(layer, range, w.mutable_data_ptr(), layer.in, type_of(w), stream);
  });
}

void check_place(const char* name, const at::Tensor& x, const at::Tensor& codes,
                 c10::string_view codec) {
  TORCH_CHECK_VALUE(x.device() == codes.device(), codec, ": ", name, " is on ", x.device(),
                    " but the codes are on ", codes.device());
}

DeviceTerms bind_terms(const at::Tensor& codes, at::TensorList params, c10::string_view codec,
                       at::IntArrayRef shape) {
  DeviceTerms all{bind_layers(codes, params, codec, shape), {}};
  for (size_t t = 0; t < all.bound.layers.size(); ++t) {
    const Term& term = (*all.bound.terms)[t];
    const Layer& layer = all.bound.layers[t];
    DeviceTerm device{&term.row, cuda_row(term), {}, all.bound.shape, codes, {}, {}};
    TORCH_CHECK_NOT_IMPLEMENTED(device.cuda.decode, codec, ": ", term.row.name,
                                " has no CUDA kernels yet");
    if (!device.cuda.takes_float && !has_product_memory(codes))
      device.cuda.linear = device.cuda.grad_input = nullptr;
    device.layer = {layer.out, layer.in, layer.tile, layer.codes, {}, nullptr};
    TORCH_INTERNAL_ASSERT(layer.params.size() <= kMostParams);
    std::copy(layer.params.begin(), layer.params.end(), device.layer.params);
    if (reinterpret_cast<uintptr_t>(layer.codes) % kCodesAlignment) {  // a view into other bytes
      const int64_t bytes = layer.tile_rows() * layer.tile_cols() * layer.tile.bytes;
      device.aligned =
          at::from_blob(const_cast<uint8_t*>(layer.codes), {bytes}, codes.options()).clone();
      device.layer.codes = device.aligned.const_data_ptr<uint8_t>();
    }
    if (device.cuda.table_bytes && shape[0] && shape[1]) {
      device.tables = at::empty({device.cuda.table_bytes}, codes.options());
      device.layer.tables = device.tables.mutable_data_ptr();
      launch(codes, [&](cudaStream_t stream) { return device.cuda.prepare(device.layer, stream); });
    }
    all.terms.push_back(std::move(device));
  }
  return all;
}

at::Tensor through_frame(const at::Tensor& x, int64_t n, int64_t width, const float* before,
                         int64_t block, const float* after, at::ScalarType type) {
  if (!before && !after && block == 1 && x.size(1) == width) return x.to(type);
  at::Tensor y = at::empty({x.size(0), width}, x.options().dtype(type));
  if (!y.numel()) return y;
  launch(x, [&](cudaStream_t stream) {
    return frame_rows({x.const_data_ptr(), type_of(x), x.size(1), y.mutable_data_ptr(), type_of(y),
                       width, x.size(0), n, width, before, block, after},
                      stream);
  });
  return y;
}

void rotate(const DeviceTerm& term, const at::Tensor& x) {
  const int64_t n = term.shape.in, width = term.layer.in;
  float* data = x.mutable_data_ptr<float>();
  launch(x, [&](cudaStream_t stream) {
    if (term.row->in_block > 1)
      if (const cudaError_t error =
              frame_rows({data, Type::float32, width, data, Type::float32, width, x.size(0), n, n,
                          nullptr, term.row->in_block, nullptr},
                         stream);
          error != cudaSuccess)
        return error;
    return hadamard_columns(data, x.size(0), n, width, term.row->out_block, stream);
  });
}

at::Tensor flat(const at::Tensor& x, int64_t features) {
  return x.reshape({features ? x.numel() / features : 0, features}).contiguous();
}

}  // namespace rs::cuda
