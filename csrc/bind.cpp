#include "bind.h"

#include <cmath>
#include <mutex>
#include <unordered_map>

#include "codecs/trellis.h"
#include "cpu/isa.h"

namespace rs {

std::shared_ptr<const void> (*device_row)(const Term&) = nullptr;

std::shared_ptr<const std::vector<Term>> resolve_cached(c10::string_view codec, Shape shape) {
  static std::mutex mutex;
  static std::unordered_map<std::string, std::shared_ptr<const std::vector<Term>>> cache;
  std::string key(codec.data(), codec.size());
  key += '|' + std::to_string(shape.out) + 'x' + std::to_string(shape.in) + isa_name(current_isa());
  const std::lock_guard lock(mutex);
  auto& entry = cache[key];
  if (!entry) {
    if (cache.size() > 4096) cache = {};  // specs come from files: keep a bound
    try {
      auto terms = std::make_shared<std::vector<Term>>(
          resolve(Spec::parse({codec.data(), codec.size()}), shape));
      if (device_row)
        for (Term& term : *terms) term.device = device_row(term);
      cache[key] = terms;
      return terms;
    } catch (const std::invalid_argument& error) {
      cache.erase(key);
      TORCH_CHECK_VALUE(false, error.what());
    }
  }
  return entry;
}

Shape check_shape(c10::string_view codec, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(shape.size() == 2 && shape[0] >= 0 && shape[1] >= 0 &&
                        shape[0] < (int64_t{1} << 40) && shape[1] < (int64_t{1} << 40),
                    codec, ": shape must be [out_features, in_features], got ", shape);
  return {shape[0], shape[1]};
}

namespace {

void check_codes_tensor(const at::Tensor& codes, const Tile& tile, int64_t out, int64_t in,
                        c10::string_view codec, const char* name) {
  TORCH_CHECK_TYPE(codes.scalar_type() == at::kByte, codec, ": ", name, " must be uint8, got ",
                   codes.scalar_type());
  const std::vector<int64_t> wanted{out / tile.rows, in / tile.cols, tile.bytes};
  TORCH_CHECK_VALUE(codes.sizes() == at::IntArrayRef(wanted), codec, ": ", name,
                    " must have shape ", at::IntArrayRef(wanted), ", got ", codes.sizes());
}

}  // namespace

Bound bind_layers(const at::Tensor& codes, at::TensorList params, c10::string_view codec,
                  at::IntArrayRef sizes) {
  Bound bound;
  bound.shape = check_shape(codec, sizes);
  bound.terms = resolve_cached(codec, bound.shape);
  size_t expected = 0;
  for (const Term& term : *bound.terms) expected = term.first_param + term.row.params.size();
  TORCH_CHECK_VALUE(params.size() == expected, codec, ": expected ", expected, " params, got ",
                    params.size());
  bound.alive.reserve(2 * expected + 2);
  for (const Term& term : *bound.terms) {
    const Row& row = term.row;
    Layer layer;
    layer.spec = &term.spec;
    layer.tile = row.tile;
    layer.out = round_up(bound.shape.out, row.tile.rows);
    layer.in = round_up(bound.shape.in, row.tile.cols);
    const at::Tensor& own = term.codes_param < 0 ? codes : params[term.codes_param];
    check_codes_tensor(own, row.tile, layer.out, layer.in, codec,
                       term.codes_param < 0 ? "codes" : "rest_codes");
    TORCH_CHECK_VALUE(own.device() == codes.device(), codec,
                      ": codes and rest_codes are on different devices");
    bound.alive.push_back(own.contiguous());
    layer.codes = bound.alive.back().data_ptr<uint8_t>();
    for (size_t i = 0; i < row.params.size(); ++i) {
      const at::Tensor& param = params[term.first_param + i];
      const ParamSpec& wanted = row.params[i];
      const auto type = wanted.codes ? at::kByte : at::kFloat;
      TORCH_CHECK_TYPE(param.scalar_type() == type, codec, ": param ", term.prefix, wanted.name,
                       " must be ", wanted.codes ? "uint8" : "float32", ", got ",
                       param.scalar_type());
      TORCH_CHECK_VALUE(param.sizes() == at::IntArrayRef(wanted.sizes), codec, ": param ",
                        term.prefix, wanted.name, " must have shape ",
                        at::IntArrayRef(wanted.sizes), ", got ", param.sizes());
      TORCH_CHECK_VALUE(param.device() == codes.device(), codec, ": param ", term.prefix,
                        wanted.name, " is on ", param.device(), " but the codes are on ",
                        codes.device());
      bound.alive.push_back(param.contiguous());
      layer.params.push_back(static_cast<const float*>(bound.alive.back().data_ptr()));
    }
    bound.layers.push_back(std::move(layer));
  }
  return bound;
}

void check_activation(const char* name, const at::Tensor& x, int64_t features,
                      c10::string_view codec) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kHalf ||
                       x.scalar_type() == at::kBFloat16,
                   codec, ": ", name, " must be float32, float16 or bfloat16, got ",
                   x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == features, codec, ": ", name, " must end in ",
                    features, " features, got shape ", x.sizes());
}

void check_batches(const at::Tensor& grad, const at::Tensor& x, int64_t out, int64_t in,
                   c10::string_view codec) {
  check_activation("x", x, in, codec);
  check_activation("grad", grad, out, codec);
  TORCH_CHECK_VALUE(x.sizes().slice(0, x.dim() - 1) == grad.sizes().slice(0, grad.dim() - 1), codec,
                    ": x and grad must have the same batch shape, got ", x.sizes(), " and ",
                    grad.sizes());
}

void check_weight_gradient(const at::Tensor& grad, at::IntArrayRef shape, c10::string_view codec) {
  TORCH_CHECK_TYPE(grad.scalar_type() == at::kFloat, codec, ": grad must be float32, got ",
                   grad.scalar_type());
  TORCH_CHECK_VALUE(grad.sizes() == shape, codec, ": grad must have shape ", shape, ", got ",
                    grad.sizes());
}

void check_hadamard(const at::Tensor& x, int64_t block) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kHalf ||
                       x.scalar_type() == at::kBFloat16,
                   "hadamard: x must be float32, float16 or bfloat16, got ", x.scalar_type());
  TORCH_CHECK_VALUE(
      block >= 1 && (block & (block - 1)) == 0 && x.dim() >= 1 && x.size(-1) % block == 0,
      "hadamard: block must be a power of two that divides the last size, got ", block, " for ",
      x.sizes());
}

const BitLayout& check_bit_derivative(const at::Tensor& codes, int64_t order,
                                      c10::string_view layout) {
  const BitLayout* found = bit_layout({layout.data(), layout.size()});
  TORCH_CHECK_VALUE(found, "bit_derivative: layout must be one of ", bit_layout_names(), ", got '",
                    layout, "'");
  TORCH_CHECK_TYPE(codes.scalar_type() == at::kInt, "bit_derivative: codes must be int32, got ",
                   codes.scalar_type());
  TORCH_CHECK_VALUE(order >= 0, "bit_derivative: order must be 0 or more, got ", order);
  return *found;
}

void check_finite(const at::Tensor& weight, c10::string_view codec) {
  const at::Tensor bad = weight.isfinite().logical_not().flatten().nonzero();
  if (!bad.numel()) return;
  const int64_t at = bad[0].item<int64_t>();
  TORCH_CHECK_VALUE(false, codec, ": the weight is not finite at (", at / weight.size(1), ", ",
                    at % weight.size(1), "): ", weight.flatten()[at].item<float>());
}

int check_trellis_encode(const at::Tensor& targets, const at::Tensor& radius,
                         const at::Tensor& angle, double bits, c10::string_view search) {
  const double k = 2 * bits;
  TORCH_CHECK_VALUE(k == std::floor(k) && k >= 3 && k <= 8,
                    "trellis_encode: bits must be 1.5 to 4 by halves, got ", bits);
  TORCH_CHECK_VALUE(search == "exact" || search == "fast",
                    "trellis_encode: search must be exact or fast, got ", search);
  TORCH_CHECK_TYPE(targets.scalar_type() == at::kFloat && radius.scalar_type() == at::kFloat &&
                       angle.scalar_type() == at::kFloat,
                   "trellis_encode: targets, radius and angle must be float32");
  TORCH_CHECK_VALUE(targets.dim() == 2 && targets.size(1) == 256,
                    "trellis_encode: targets must be (tiles, 256), got ", targets.sizes());
  TORCH_CHECK_VALUE(radius.sizes() == at::IntArrayRef({kTrellisRadii}) &&
                        angle.sizes() == at::IntArrayRef({kTrellisAngles}),
                    "trellis_encode: radius must be (64,) and angle (16,), got ", radius.sizes(),
                    " and ", angle.sizes());
  TORCH_CHECK_VALUE(radius.device() == targets.device() && angle.device() == targets.device(),
                    "trellis_encode: targets are on ", targets.device(), " but radius is on ",
                    radius.device(), " and angle on ", angle.device());
  check_finite(targets, "trellis_encode");
  return static_cast<int>(k);
}

Encoding begin_encoding(const at::Tensor& weight, const std::optional<at::Tensor>& importance,
                        at::TensorList params, c10::string_view codec) {
  TORCH_CHECK_TYPE(weight.scalar_type() == at::kFloat, codec, ": weight must be float32, got ",
                   weight.scalar_type());
  TORCH_CHECK_VALUE(weight.dim() == 2, codec, ": weight must have two dimensions, got shape ",
                    weight.sizes());
  Encoding encoding{resolve_cached(codec, check_shape(codec, weight.sizes())), {}, {}, {}};
  TORCH_CHECK_VALUE(encoding.terms->size() == 1, codec, ": encode its parts one after the other");
  const Tile& tile = encoding.row().tile;
  const int64_t rows = (weight.size(0) + tile.rows - 1) / tile.rows,
                cols = (weight.size(1) + tile.cols - 1) / tile.cols;
  for (const at::Tensor& p : params)
    encoding.params.push_back(p.clone(at::MemoryFormat::Contiguous));
  encoding.codes = at::zeros({rows, cols, tile.bytes}, weight.options().dtype(at::kByte));
  bind_layers(encoding.codes, encoding.params, codec, weight.sizes());
  if (importance) {
    TORCH_CHECK_VALUE(importance->sizes() == at::IntArrayRef({weight.size(1)}) &&
                          importance->gt(0).all().item<bool>(),
                      codec, ": importance must be ", weight.size(1), " positive numbers");
    encoding.importance = at::ones({cols * tile.cols}, weight.options());
    encoding.importance.narrow(0, 0, weight.size(1)).copy_(*importance);
  }
  check_finite(weight, codec);
  return encoding;
}

at::Tensor without_scales(const at::Tensor& weight, const Encoding& encoding) {
  const Row& row = encoding.row();
  const at::Tensor target =
      at::zeros({encoding.codes.size(0) * row.tile.rows, encoding.codes.size(1) * row.tile.cols},
                weight.options());
  at::Tensor inside = target.narrow(0, 0, weight.size(0)).narrow(1, 0, weight.size(1));
  inside.copy_(weight);
  if (row.out_scale >= 0)
    inside.div_(encoding.params[row.out_scale].unsqueeze(1)).nan_to_num_(0, 0, 0);
  if (row.in_scale >= 0) inside.div_(encoding.params[row.in_scale]).nan_to_num_(0, 0, 0);
  return target;
}

}  // namespace rs
