#include "ultra.h"

#include <cstring>

#include "../cpu/clones.h"
#include "../cpu/loops.h"
#include "sparse.h"

namespace rs {
namespace {

constexpr int kLanes = 16;  // candidates side by side
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

// The codebook with the vectors' entries apart, so that candidates are neighbours.
struct alignas(64) Columns {
  Floats entry[4][Ultra::kVectors / kLanes];

  explicit Columns(const Ultra::Tables& t) {
    for (int k = 0; k < Ultra::kVectors; ++k)
      for (int j = 0; j < 4; ++j) entry[j][k / kLanes][k % kLanes] = t.vector[k][j];
  }
};

// The vector with the least sum of h (w - c)^2, the first of equals: of the cost only h c (c - 2 w)
// differs between vectors.
RS_CLONES int nearest(const Columns& columns, const float* w, const float* h) {
  Floats best = Floats{} + 3.4e38f;
  Ints at{}, step{};
  for (int k = 0; k < Ultra::kVectors / kLanes; ++k, step += 1) {
    Floats cost{};
    for (int j = 0; j < 4; ++j) {
      const Floats c = columns.entry[j][k];
      cost += h[j] * c * (c - 2 * w[j]);
    }
    const Ints better = cost < best;
    best = better ? cost : best;
    at = better ? step : at;
  }
  at = at * kLanes;
  int found = 0;
  for (int lane = 1; lane < kLanes; ++lane)
    if (best[lane] < best[found] ||
        (best[lane] == best[found] && at[lane] + lane < at[found] + found))
      found = lane;
  return at[found] + found;
}

void encode(const Layer& layer, const float* w, const EncodeOptions& options, int64_t tile0,
            int64_t tile1, uint8_t* codes, float* const*) {
  const auto columns = std::make_unique<Columns>(*std::make_unique<Ultra::Tables>(layer));
  const float ones[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  for (int64_t t = tile0; t < tile1; ++t) {
    const int64_t col = t % layer.tile_cols() * 16;
    const float* from = w + t / layer.tile_cols() * layer.in + col;
    const float* h = options.importance ? options.importance + col : ones;
    uint64_t word = 0;
    for (int i = 0; i < 4; ++i)
      word |= static_cast<uint64_t>(nearest(*columns, from + 4 * i, h + 4 * i)) << (10 * i);
    for (int byte = 0; byte < 5; ++byte)
      codes[t * 5 + byte] = static_cast<uint8_t>(word >> (8 * byte));
  }
}

void decode(const Layer& layer, int64_t row0, int64_t row1, float* w) {
  const auto t = std::make_unique<Ultra::Tables>(layer);
  const uint8_t* tile = layer.codes + row0 * layer.tile_cols() * 5;
  for (int64_t n = (row1 - row0) * layer.tile_cols(); n; --n, tile += 5, w += 16)
    for (int i = 0; i < 4; ++i)
      std::memcpy(w + 4 * i, t->vector[Ultra::index(tile, i)], sizeof t->vector[0]);
}

void adjoint(const Layer& layer, int64_t row0, int64_t row1, const float* dw, float* const* grads) {
  adjoint_loop<Ultra>(layer, row0, row1, dw, grads);
}

void check(const Layer& layer, int64_t) {
  if (*reinterpret_cast<const uint8_t*>(layer.params[Ultra::kTransform]) > 7)
    throw std::invalid_argument("the transform must be below 8");
}

}  // namespace

std::vector<Term> ultra_terms(const Spec& spec, Shape shape) {
  spec.only({"codebook", "percent"});
  const std::string codebook = spec.word("codebook", "layer"), percent = spec.word("percent", "1");
  if (codebook != "layer" && codebook != "model")
    throw std::invalid_argument("ultra: codebook must be layer or model, got '" + codebook + "'");
  Term term;
  Row& row = term.row;
  row.name = "ultra";
  row.tile = {1, 16, 5};
  row.params = {{"codebook", Axis::shared, {Ultra::kVectors, 4}},
                {"transform", Axis::shared, {1}, true},
                {"out_scale", Axis::out, {shape.out}}};
  row.out_scale = Ultra::kOutScale;
  row.decode = decode;
  row.adjoint = adjoint;
  row.encode = encode;
  row.check = check;
  std::vector<Term> terms{term};
  if (spec.number("percent", 1) == 0) return terms;
  Term rest = sparse_terms(Spec{"sparse", {{"percent", {percent, {}}}}}, shape).front();
  rest.codes_param = static_cast<int>(row.params.size());
  rest.first_param = rest.codes_param + 1;
  rest.prefix = "rest_";
  terms.push_back(std::move(rest));
  return terms;
}

}  // namespace rs
