#include "ultra.h"

#include <cstring>

#include "../cpu/fast.h"
#include "../cpu/loops.h"
#include "../cpu/widths.h"
#include "sparse.h"

namespace rs {
namespace {

// The codebook with the vectors' entries apart, so that candidates are neighbours.
struct alignas(64) Columns {
  float entry[4][Ultra::kVectors], square[Ultra::kVectors];

  explicit Columns(const Ultra::Tables& t) {
    for (int k = 0; k < Ultra::kVectors; ++k) {
      square[k] = 0;
      for (int j = 0; j < 4; ++j) {
        entry[j][k] = t.vector[k][j];
        square[k] += entry[j][k] * entry[j][k];
      }
    }
  }
};

// The least cost of each of L lanes.
template <int L>
struct Best {
  using Floats = VectorOf<float, L>;
  using Ints = VectorOf<int32_t, L>;
  Floats cost = Floats{} + 3.4e38f;
  Ints first{};

  // Candidates k to k + L - 1. The first of equal costs stays.
  RS_INLINE void offer(const Floats& other, int32_t k) {
    const Ints better = other < cost;
    cost = better ? other : cost;
    first = better ? k + Ints{} : first;
  }
  RS_INLINE int index() const {
    int found = 0;
    for (int lane = 1; lane < L; ++lane)
      if (cost[lane] < cost[found] || (cost[lane] == cost[found] && first[lane] < first[found]))
        found = lane;
    return first[found] + found;
  }
};

// The vector with the least |w - c|^2; only |c|^2 - 2 w c differs between vectors.
template <int L>
RS_INLINE int nearest(const Columns& columns, const float* w) {
  Best<L> best;
  for (int k = 0; k < Ultra::kVectors; k += L) {
    VectorOf<float, L> cost = at<float, L>(columns.square + k);
    for (int j = 0; j < 4; ++j) cost -= 2 * w[j] * at<float, L>(columns.entry[j] + k);
    best.offer(cost, k);
  }
  return best.index();
}

// The same with the sum of h (w - c)^2.
template <int L>
RS_INLINE int nearest_weighted(const Columns& columns, const float* w, const float* h) {
  Best<L> best;
  for (int k = 0; k < Ultra::kVectors; k += L) {
    VectorOf<float, L> cost{};
    for (int j = 0; j < 4; ++j) {
      const VectorOf<float, L> c = at<float, L>(columns.entry[j] + k);
      cost += h[j] * c * (c - 2 * w[j]);
    }
    best.offer(cost, k);
  }
  return best.index();
}

int nearest(const Columns& columns, const float* w, const float* h) {
  int index;
  by_width([&]<int L>() RS_LAMBDA {
    index = h ? nearest_weighted<L>(columns, w, h) : nearest<L>(columns, w);
  });
  return index;
}

void encode(const Layer& layer, const float* w, const EncodeOptions& options, int64_t tile0,
            int64_t tile1, uint8_t* codes, float* const*) {
  const auto columns = std::make_unique<Columns>(*std::make_unique<Ultra::Tables>(layer));
  for (int64_t t = tile0; t < tile1; ++t) {
    const int64_t col = t % layer.tile_cols() * 16;
    const float* from = w + t / layer.tile_cols() * layer.in + col;
    uint64_t word = 0;
    for (int i = 0; i < 4; ++i) {
      const int index = nearest(*columns, from + 4 * i,
                                options.importance ? options.importance + col + 4 * i : nullptr);
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
