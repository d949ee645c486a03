#include "ultra.h"

#include <cstring>

#include "../cpu/clones.h"
#include "../cpu/fast.h"
#include "../cpu/loops.h"
#include "sparse.h"

namespace rs {
namespace {

constexpr int kLanes = 16;  // candidates side by side
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

// The codebook with the vectors' entries apart, so that candidates are neighbours.
struct alignas(64) Columns {
  Floats entry[4][Ultra::kVectors / kLanes], square[Ultra::kVectors / kLanes];

  explicit Columns(const Ultra::Tables& t) {
    for (int k = 0; k < Ultra::kVectors; ++k)
      for (int j = 0; j < 4; ++j) entry[j][k / kLanes][k % kLanes] = t.vector[k][j];
    for (int k = 0; k < Ultra::kVectors / kLanes; ++k) {
      square[k] = Floats{};
      for (int j = 0; j < 4; ++j) square[k] += entry[j][k] * entry[j][k];
    }
  }
};

struct Best {
  Floats cost = Floats{} + 3.4e38f;
  Ints at{};

  // Candidate `step` of every lane. The first of equal costs stays.
  __attribute__((always_inline)) void offer(const Floats& other, const Ints& step) {
    const Ints better = other < cost;
    cost = better ? other : cost;
    at = better ? step : at;
  }
  int index() const {
    int found = 0;
    for (int lane = 1; lane < kLanes; ++lane)
      if (cost[lane] < cost[found] || (cost[lane] == cost[found] && at[lane] < at[found]))
        found = lane;
    return at[found] * kLanes + found;
  }
};

// The vector with the least |w - c|^2; only |c|^2 - 2 w c differs between vectors.
RS_CLONES int nearest(const Columns& columns, const float* w) {
  Best best;
  Ints step{};
  for (int k = 0; k < Ultra::kVectors / kLanes; ++k, step += 1) {
    Floats cost = columns.square[k];
    for (int j = 0; j < 4; ++j) cost -= 2 * w[j] * columns.entry[j][k];
    best.offer(cost, step);
  }
  return best.index();
}

// The same with the sum of h (w - c)^2.
RS_CLONES int nearest_weighted(const Columns& columns, const float* w, const float* h) {
  Best best;
  Ints step{};
  for (int k = 0; k < Ultra::kVectors / kLanes; ++k, step += 1) {
    Floats cost{};
    for (int j = 0; j < 4; ++j) {
      const Floats c = columns.entry[j][k];
      cost += h[j] * c * (c - 2 * w[j]);
    }
    best.offer(cost, step);
  }
  return best.index();
}

void encode(const Layer& layer, const float* w, const EncodeOptions& options, int64_t tile0,
            int64_t tile1, uint8_t* codes, float* const*) {
  const auto columns = std::make_unique<Columns>(*std::make_unique<Ultra::Tables>(layer));
  for (int64_t t = tile0; t < tile1; ++t) {
    const int64_t col = t % layer.tile_cols() * 16;
    const float* from = w + t / layer.tile_cols() * layer.in + col;
    uint64_t word = 0;
    for (int i = 0; i < 4; ++i) {
      const int index = options.importance ? nearest_weighted(*columns, from + 4 * i,
                                                              options.importance + col + 4 * i)
                                           : nearest(*columns, from + 4 * i);
      word |= static_cast<uint64_t>(index) << (10 * i);
    }
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
  ultra_fast_slots(row, current_isa());
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
