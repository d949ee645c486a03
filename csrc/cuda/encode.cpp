// encode and trellis_encode on CUDA tensors. Both wait for the device once: weights are read to
// find values that are not finite.
#include "../cpu/ops.h"
#include "layers.h"
#include "viterbi.h"

namespace rs::cuda {
namespace {

at::Tensor scratch_of(int64_t bytes, const at::Tensor& like) {
  return at::empty({bytes}, like.options().dtype(at::kByte));
}

// Codecs without a search on the device: the CPU's, and its results back.
std::tuple<at::Tensor, Tensors> encode_on_host(const at::Tensor& weight,
                                               const std::optional<at::Tensor>& importance,
                                               at::TensorList params, c10::string_view codec) {
  Tensors host;
  for (const at::Tensor& p : params) host.push_back(p.cpu());
  std::optional<at::Tensor> columns;
  if (importance) columns = importance->cpu();
  auto [codes, fitted] = encode(weight.cpu(), columns, host, codec);
  for (size_t i = 0; i < fitted.size(); ++i) fitted[i] = fitted[i].to(weight.device());
  return {codes.to(weight.device()), fitted};
}

std::tuple<at::Tensor, Tensors> encode_op(const at::Tensor& weight,
                                          const std::optional<at::Tensor>& importance,
                                          at::TensorList params, c10::string_view codec) {
  const Encoding encoding = begin_encoding(weight, importance, params, codec);
  if (!encoding.codes.numel()) return {encoding.codes, encoding.params};
  const CudaRow& cuda = cuda_row(encoding.terms->front());
  if (!cuda.encode || !cuda.decode) return encode_on_host(weight, importance, params, codec);

  const c10::cuda::CUDAGuard guard(weight.device());  // which scratch sizes depend on
  const DeviceTerms all = bind_terms(encoding.codes, encoding.params, codec, weight.sizes());
  const DeviceTerm& term = all.terms.front();
  const at::Tensor target = without_scales(weight, encoding);
  rotate(term, target.narrow(0, 0, weight.size(0)));
  const at::Tensor scratch =
      scratch_of(cuda.encode_scratch ? cuda.encode_scratch(term.layer) : 0, weight);
  float* outputs[kMostParams] = {};
  for (size_t i = 0; i < encoding.params.size(); ++i)
    outputs[i] = static_cast<float*>(encoding.params[i].mutable_data_ptr());
  launch(weight, [&](cudaStream_t stream) {
    return cuda.encode(
        term.layer, target.const_data_ptr<float>(),
        encoding.importance.defined() ? encoding.importance.const_data_ptr<float>() : nullptr,
        encoding.codes.mutable_data_ptr<uint8_t>(), outputs, scratch.mutable_data_ptr(), stream);
  });
  return {encoding.codes, encoding.params};
}

at::Tensor trellis_encode_op(const at::Tensor& targets, const at::Tensor& radius,
                             const at::Tensor& angle, double bits, c10::string_view search) {
  const int k = check_trellis_encode(targets, radius, angle, bits, search);
  const c10::cuda::CUDAGuard guard(targets.device());
  const at::Tensor in = targets.contiguous(), radii = radius.contiguous(),
                   angles = angle.contiguous();
  const TrellisTargets tiles{in.const_data_ptr<float>(), 16 * in.size(0), 16,
                             radii.const_data_ptr<float>(), angles.const_data_ptr<float>()};
  const at::Tensor codes = at::empty({in.size(0), 16 * k}, in.options().dtype(at::kByte));
  const at::Tensor scratch = scratch_of(viterbi_scratch(tiles, k), in);
  launch(in, [&](cudaStream_t stream) {
    return viterbi(tiles, k, search == "fast" ? Search::fast : Search::exact,
                   codes.mutable_data_ptr<uint8_t>(), scratch.mutable_data_ptr(), stream);
  });
  return codes;
}

}  // namespace
}  // namespace rs::cuda

RS_CUDA_IMPL(m) {
  m.impl("encode", rs::cuda::encode_op);
  m.impl("trellis_encode", rs::cuda::trellis_encode_op);
}
