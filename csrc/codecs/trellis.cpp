#include "trellis.h"

#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <tuple>

#include "../cpu/fast.h"
#include "../cpu/loops.h"
#include "../cpu/viterbi.h"

namespace rs {

std::shared_ptr<const TrellisSearch> trellis_search(int k, const float* radius, const float* angle,
                                                    Search search) {
  using Key = std::tuple<int, Search, Isa, std::array<float, kTrellisRadii + kTrellisAngles>>;
  Key key{k, search, current_isa(), {}};
  std::memcpy(std::get<3>(key).data(), radius, kTrellisRadii * sizeof(float));
  std::memcpy(std::get<3>(key).data() + kTrellisRadii, angle, kTrellisAngles * sizeof(float));
  static std::mutex mutex;
  static Key last_key{};
  static std::shared_ptr<const TrellisSearch> last;
  const std::lock_guard lock(mutex);
  if (!last || key != last_key) {
    last = std::make_shared<const TrellisSearch>(k, radius, angle, search, current_isa());
    last_key = key;
  }
  return last;
}

namespace {

template <int K, Search search>
void encode(const Layer& layer, const float* w, const EncodeOptions&, int64_t tile0, int64_t tile1,
            uint8_t* codes, float* const*) {
  constexpr int kBatch = TrellisSearch::kBatch;
  const auto viterbi = trellis_search(K, layer.params[Trellis<K>::kRadius],
                                      layer.params[Trellis<K>::kAngle], search);
  float targets[kBatch * 256];
  for (int64_t t = tile0; t < tile1; t += kBatch) {
    const int64_t n = std::min<int64_t>(kBatch, tile1 - t);
    for (int64_t b = 0; b < n; ++b) {
      const float* tile =
          w + (t + b) / layer.tile_cols() * 16 * layer.in + (t + b) % layer.tile_cols() * 16;
      for (int i = 0; i < 256; ++i) targets[b * 256 + i] = tile[i / 16 * layer.in + i % 16];
    }
    viterbi->run(targets, n, codes + t * layer.tile.bytes);
  }
}

template <int K>
void fill(Row& row, Search search, Isa isa) {
  row.decode = decode_loop<Trellis<K>>;
  row.adjoint = adjoint_loop<Trellis<K>>;
  row.encode = search == Search::exact ? encode<K, Search::exact> : encode<K, Search::fast>;
  trellis_fast_slots(row, K, isa);
}

}  // namespace

std::vector<Term> trellis_terms(const Spec& spec, Shape shape) {
  spec.only({"bits", "rotate", "search"});
  const double k = 2 * spec.number("bits", 2);
  if (k != std::floor(k) || k < 3 || k > 8)
    throw std::invalid_argument("trellis: bits must be 1.5, 2, 2.5, 3, 3.5 or 4, got " +
                                spec.word("bits", ""));
  const std::string search = spec.word("search", "exact");
  if (search != "exact" && search != "fast")
    throw std::invalid_argument("trellis: search must be exact or fast, got '" + search + "'");
  const bool rotate = spec.flag("rotate", true);
  Term term;
  Row& row = term.row;
  row.name = "trellis";
  row.tile = {16, 16, static_cast<int64_t>(16 * k)};
  row.params = {{"radius", Axis::shared, {kTrellisRadii}},
                {"angle", Axis::shared, {kTrellisAngles}},
                {"out_scale", Axis::out, {shape.out}},
                {"in_scale", Axis::in, {shape.in}}};
  row.out_scale = 2;
  row.in_scale = 3;
  if (rotate) row.out_block = hadamard_block(shape.out), row.in_block = hadamard_block(shape.in);
  row.encode_batch = TrellisSearch::kBatch;
  with_trellis_bits(static_cast<int>(k), [&]<int K> {
    fill<K>(row, search == "fast" ? Search::fast : Search::exact, current_isa());
  });
  return {term};
}

}  // namespace rs
