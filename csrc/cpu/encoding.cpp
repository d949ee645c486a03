#include <ATen/Parallel.h>

#include <atomic>
#include <chrono>

#include "../bind.h"
#include "../codecs/trellis.h"
#include "ops.h"
#include "parallel.h"
#include "terms.h"
#include "viterbi.h"

namespace rs {
namespace {

std::atomic<Progress> progress_hook{nullptr};

// Work in chunks of about a tenth of a second, so that a signal is seen within one.
template <class Body>
void in_chunks(int64_t total, int64_t batch, Body&& body) {
  using Clock = std::chrono::steady_clock;
  int64_t chunk = batch * at::get_num_threads();
  for (int64_t done = 0; done < total;) {
    const int64_t end = std::min(total, done + chunk);
    const auto start = Clock::now();
    parallel_for(end - done, batch, [&](int64_t a, int64_t b) { body(done + a, done + b); });
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    done = end;
    if (seconds < 0.05) chunk *= 2;
    if (seconds > 0.2) chunk = std::max(batch * at::get_num_threads(), chunk / 2);
    if (Progress hook = progress_hook) hook(done, total);
  }
}

}  // namespace

void set_progress_hook(Progress hook) { progress_hook = hook; }

std::tuple<at::Tensor, Tensors> encode(const at::Tensor& weight,
                                       const std::optional<at::Tensor>& importance,
                                       at::TensorList params, c10::string_view codec) {
  Encoding encoding = begin_encoding(weight, importance, params, codec);
  const Row& row = encoding.row();
  if (!encoding.codes.numel()) return {encoding.codes, encoding.params};
  const Bound bound = bind_layers(encoding.codes, encoding.params, codec, weight.sizes());
  const Layer& layer = bound.layers[0];
  EncodeOptions options;
  if (encoding.importance.defined()) options.importance = encoding.importance.data_ptr<float>();

  const at::Tensor target = without_scales(weight, encoding);
  parallel_for(weight.size(0), row.out_block, [&](int64_t begin, int64_t end) {
    rotate(row, target.data_ptr<float>() + begin * layer.in, end - begin, layer.in, weight.size(1));
  });

  std::vector<float*> outputs;
  for (at::Tensor& p : encoding.params) outputs.push_back(static_cast<float*>(p.data_ptr()));
  in_chunks(layer.tile_rows() * layer.tile_cols(), row.encode_batch,
            [&](int64_t tile0, int64_t tile1) {
              row.encode(layer, target.data_ptr<float>(), options, tile0, tile1,
                         encoding.codes.data_ptr<uint8_t>(), outputs.data());
            });
  return {encoding.codes, encoding.params};
}

at::Tensor trellis_encode(const at::Tensor& targets, const at::Tensor& radius,
                          const at::Tensor& angle, double bits, c10::string_view search) {
  const int k = check_trellis_encode(targets, radius, angle, bits, search);
  const at::Tensor in = targets.contiguous(), radii = radius.contiguous(),
                   angles = angle.contiguous();
  at::Tensor codes = at::zeros({in.size(0), 16 * k}, at::kByte);
  const auto viterbi = trellis_search(k, radii.data_ptr<float>(), angles.data_ptr<float>(),
                                      search == "fast" ? Search::fast : Search::exact);
  in_chunks(in.size(0), TrellisSearch::kBatch, [&](int64_t begin, int64_t end) {
    viterbi->run(in.data_ptr<float>() + begin * 256, end - begin,
                 codes.data_ptr<uint8_t>() + begin * codes.size(1));
  });
  return codes;
}

}  // namespace rs
