#include "qat_linear.h"

#include <cmath>
#include <string>
#include <vector>

#include "cpu/clones.h"
#include "cpu/half.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/qat_rows.h"

namespace rs::qat {
namespace {

constexpr int64_t kPanel = int64_t{1} << 20;  // weights quantized at a time: 4 MB
constexpr int64_t kGroup = 8;                 // rows that share a partial sum of the levels

Mode mode_of(c10::string_view mode) {
  if (mode == "ste") return Mode::ste;
  if (mode == "attenuated") return Mode::attenuated;
  if (mode == "codebook") return Mode::codebook;
  if (mode == "gumbel") return Mode::gumbel;
  TORCH_CHECK_VALUE(false, "mode must be ste, attenuated, codebook or gumbel, got '", mode, "'");
}

// A NaN in the weight must not pass unseen: it makes the loss one.
void explain(double loss, const Call& call) {
  if (!std::isfinite(loss)) {
    const at::Tensor bad = call.weight.isfinite().logical_not().nonzero();
    if (bad.size(0)) {
      const int64_t i = bad[0][0].item<int64_t>(), j = bad[0][1].item<int64_t>();
      TORCH_CHECK_VALUE(false, "the weight is not finite at (", i, ", ", j,
                        "): ", call.weight[i][j].item<float>());
    }
  }
  TORCH_CHECK_VALUE(call.centers.isfinite().all().item<bool>(),
                    "the centers hold a value that is not finite");
  TORCH_CHECK_VALUE((call.scale.isfinite() & call.scale.ne(0)).all().item<bool>(),
                    "the scale holds a value that is zero or not finite");
}

float scale_of(const Call& call, int64_t row) {
  return call.scale.const_data_ptr<float>()[call.scale.numel() == 1 ? 0 : row];
}

// The type of the product: bfloat16 where x has it and the processor multiplies it.
at::ScalarType product_type(const at::Tensor& x) {
  return x.scalar_type() == at::kBFloat16 && has_avx512_bf16() ? at::kBFloat16 : at::kFloat;
}

at::Tensor flat(const at::Tensor& x, int64_t features, at::ScalarType type) {
  return x.reshape({features ? x.numel() / features : 0, features}).to(type).contiguous();
}

RS_CLONES void narrow(const float* x, int64_t n, uint16_t* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = to_bf16(x[i]);
}

// Rows of quantized weights, written as float32 into a panel of the product's type.
struct PanelRow {
  std::vector<float> wide;
  const at::Tensor& panel;

  explicit PanelRow(const at::Tensor& panel)
      : wide(panel.defined() && panel.scalar_type() != at::kFloat ? panel.size(1) : 0),
        panel(panel) {}
  float* at(int64_t row) {
    if (!panel.defined()) return nullptr;
    return wide.empty() ? panel.mutable_data_ptr<float>() + row * panel.size(1) : wide.data();
  }
  void done(int64_t row) {
    if (wide.empty()) return;
    auto* to = reinterpret_cast<uint16_t*>(panel.mutable_data_ptr<at::BFloat16>());
    narrow(wide.data(), panel.size(1), to + row * panel.size(1));
  }
};

// Rows per panel, whole groups.
int64_t panel_rows(int64_t out, int64_t in) {
  return std::min(out, std::max<int64_t>(1, kPanel / (in * kGroup)) * kGroup);
}

double in_order(const std::vector<double>& parts) {
  double sum = 0;
  for (double part : parts) sum += part;
  return sum;
}

}  // namespace

Call check(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& centers, double tau,
           c10::string_view mode, const std::optional<at::Tensor>& scale) {
  const Mode kind = mode_of(mode);
  TORCH_CHECK_VALUE(tau > 0 && std::isfinite(tau), "tau must be positive and finite, got ", tau);
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight must have two dimensions, got shape ",
                    weight.sizes());
  TORCH_CHECK_VALUE(centers.dim() == 1 && centers.size(0) >= 2 && centers.size(0) <= kMaxLevels,
                    "centers must be (levels,) of 2 to ", kMaxLevels, " levels, got ",
                    centers.sizes());
  TORCH_CHECK_VALUE(
      !scale || (scale->dim() == 1 && (scale->size(0) == 1 || scale->size(0) == weight.size(0))),
      "scale must be (1,) or (", weight.size(0), ",), got ",
      scale ? scale->sizes() : at::IntArrayRef{});
  for (const at::Tensor& t : {weight, centers, scale.value_or(centers)}) {
    TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat,
                     "weight, centers and scale must be float32, got ", t.scalar_type());
    TORCH_CHECK_VALUE(t.device() == x.device(), "x is on ", x.device(),
                      ", a part of the weight on ", t.device());
  }
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kHalf ||
                       x.scalar_type() == at::kBFloat16,
                   "x must be float32, float16 or bfloat16, got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == weight.size(1), "x must end in ", weight.size(1),
                    " features, got shape ", x.sizes());
  Call call{{},
            weight.contiguous(),
            centers.contiguous(),
            scale ? scale->contiguous() : at::ones({1}, weight.options())};
  constexpr double kLowestTau = 1e-30;  // as formulas.py
  call.settings = {call.centers.const_data_ptr<float>(), static_cast<int>(centers.size(0)), kind,
                   static_cast<float>(1 / std::max(tau, kLowestTau)),
                   kind == Mode::codebook ? static_cast<float>(tau) : 1.0f};
  return call;
}

void check_gradient(const at::Tensor& grad, const at::Tensor& x, int64_t out) {
  TORCH_CHECK_VALUE(grad.dim() == x.dim() && grad.size(-1) == out &&
                        grad.sizes().slice(0, grad.dim() - 1) == x.sizes().slice(0, x.dim() - 1),
                    "the gradient of y must be y's shape, got ", grad.sizes());
}

std::tuple<at::Tensor, at::Tensor> qat_linear(const at::Tensor& x, const at::Tensor& weight,
                                              const at::Tensor& centers, double tau,
                                              c10::string_view mode,
                                              const std::optional<at::Tensor>& scale) {
  const Call call = check(x, weight, centers, tau, mode, scale);
  const int64_t out = weight.size(0), in = weight.size(1);
  auto sizes = x.sizes().vec();
  sizes.back() = out;
  at::Tensor loss = at::zeros({}, weight.options());
  if (!out || !in) return {at::zeros(sizes, x.options()), loss};

  const auto type = product_type(x);
  const at::Tensor inside = flat(x, in, type);
  at::Tensor y = at::empty({inside.size(0), out}, type);
  const int64_t rows = panel_rows(out, in);
  const at::Tensor buffer = at::empty({rows, in}, weight.options().dtype(type));
  std::vector<double> errors(static_cast<size_t>(out));
  const float* w = call.weight.const_data_ptr<float>();
  for (int64_t r = 0; r < out; r += rows) {
    const int64_t n = std::min(rows, out - r);
    const at::Tensor panel = buffer.narrow(0, 0, n);
    parallel_for(n, 1, [&](int64_t begin, int64_t end) {
      PanelRow row(panel);
      for (int64_t i = begin; i < end; ++i) {
        errors[r + i] =
            quantize_row(call.settings, w + (r + i) * in, scale_of(call, r + i), in, row.at(i));
        row.done(i);
      }
    });
    at::Tensor part = y.narrow(1, r, n);
    at::mm_out(part, inside, panel.t());
  }
  const double mean = in_order(errors) / (static_cast<double>(out) * static_cast<double>(in));
  explain(mean, call);
  loss.fill_(mean);
  return {y.to(x.scalar_type()).view(sizes), loss};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> qat_linear_backward(
    const at::Tensor& grad, const at::Tensor& grad_loss, const at::Tensor& x,
    const at::Tensor& weight, const at::Tensor& centers, double tau, c10::string_view mode,
    const std::optional<at::Tensor>& scale, std::array<bool, 4> wanted) {
  const Call call = check(x, weight, centers, tau, mode, scale);
  const int64_t out = weight.size(0), in = weight.size(1), count = call.settings.count;
  check_gradient(grad, x, out);
  const auto [want_x, want_weight, want_centers, want_scale] = wanted;
  const bool sums = want_weight || want_centers || want_scale;
  const auto none = [&] { return at::empty({0}, weight.options()); };  // no two results alike
  at::Tensor dx = want_x ? at::zeros(x.sizes(), x.options()) : none();
  at::Tensor dw = sums ? at::empty_like(call.weight) : none();
  at::Tensor dcenters = want_centers ? at::zeros_like(call.centers) : none();
  at::Tensor dscale = want_scale ? at::zeros_like(call.scale) : none();
  if (!out || !in) return {dx, want_weight ? dw : none(), dcenters, dscale};

  const auto type = product_type(x);
  const at::Tensor inside = flat(x, in, type), g = flat(grad, out, type);
  const float loss = static_cast<float>(2 * grad_loss.to(at::kDouble).item<double>() /
                                        (static_cast<double>(out) * static_cast<double>(in)));
  const int64_t rows = panel_rows(out, in), groups = (out + kGroup - 1) / kGroup;
  const at::Tensor buffer = want_x ? at::empty({rows, in}, weight.options().dtype(type)) : none();
  at::Tensor dx_sum = want_x ? at::empty({inside.size(0), in}, weight.options()) : none();
  std::vector<double> level_sums(static_cast<size_t>(want_centers ? groups * count : 0));
  std::vector<double> scale_sums(static_cast<size_t>(out));
  const Range range = range_of(call.settings.centers, call.settings.count);
  const float* w = call.weight.const_data_ptr<float>();
  for (int64_t r = 0; r < out; r += rows) {
    const int64_t n = std::min(rows, out - r);
    const at::Tensor panel = want_x ? buffer.narrow(0, 0, n) : at::Tensor();
    const at::Tensor g_part = g.narrow(1, r, n);
    if (sums) {
      at::Tensor dw_part = dw.narrow(0, r, n);
      if (type == at::kFloat)
        at::mm_out(dw_part, g_part.t(), inside);
      else
        dw_part.copy_(at::mm(g_part.t(), inside));
    }
    parallel_for(n, kGroup, [&](int64_t begin, int64_t end) {
      PanelRow row(panel);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = r + i;
        if (sums) {
          double* levels =
              want_centers ? level_sums.data() + at / kGroup * call.settings.count : nullptr;
          RowSums found{0, levels};
          quantize_row_backward(call.settings, range, w + at * in, scale_of(call, at), loss, in,
                                dw.mutable_data_ptr<float>() + at * in, row.at(i), found);
          scale_sums[at] = found.scale;
        } else {
          quantize_row(call.settings, w + at * in, scale_of(call, at), in, row.at(i));
        }
        row.done(i);
      }
    });
    if (!want_x) continue;
    if (type == at::kFloat && r)
      at::addmm_out(dx_sum, dx_sum, g_part, panel);
    else if (r)
      dx_sum.add_(at::mm(g_part, panel));
    else
      dx_sum.copy_(at::mm(g_part, panel));
  }
  if (want_x) dx = dx_sum.to(x.scalar_type()).view(x.sizes());
  for (int64_t k = 0; k < (want_centers ? count : 0); ++k) {
    double sum = 0;
    for (int64_t i = 0; i < groups; ++i) sum += level_sums[i * count + k];
    dcenters.mutable_data_ptr<float>()[k] = static_cast<float>(sum);
  }
  if (want_scale && call.scale.numel() == 1)
    dscale.fill_(in_order(scale_sums));
  else if (want_scale)
    for (int64_t i = 0; i < out; ++i)
      dscale.mutable_data_ptr<float>()[i] = static_cast<float>(scale_sums[i]);
  return {dx, want_weight ? dw : none(), dcenters, dscale};
}

}  // namespace rs::qat
