#include "cyclic_encode.h"

#include <algorithm>
#include <map>

#include "../cpu/clones.h"
#include "nearest.h"

namespace rs {
namespace {

constexpr int kLanes = 16;

struct LevelCode {
  int phase, amp;
};

// The levels a word can have, each with one of its codes.
template <class Word>
std::map<int, LevelCode> all_levels() {
  std::map<int, LevelCode> found;
  for (int amp = 0; amp < Word::kAmps; ++amp)
    for (int phase = 0; phase < 16; ++phase)
      found.try_emplace(kCyclic[0][phase] * amp, LevelCode{phase, amp});
  return found;
}

template <class Word>
struct Factors {
  std::vector<LevelCode> code;
  Nearest factor;

  explicit Factors(const std::map<int, LevelCode>& levels)
      : factor(values(levels), 4 * static_cast<int>(levels.size())) {
    for (const auto& [level, how] : levels) code.push_back(how);
  }

 private:
  static std::vector<float> values(const std::map<int, LevelCode>& levels) {
    std::vector<float> all;
    for (const auto& [level, how] : levels)
      all.push_back(static_cast<float>(level) / (1 << Word::kShift));
    return all;
  }
};

// For every vector k of a basis given by columns: cross = sum h x v_k; power = sum h v_k^2. Null h
// is ones, for which power is left alone.
RS_CLONES void project(const float* x, const float* h, const float* columns, int64_t block,
                       int64_t vectors, float* cross, float* power) {
  for (int64_t k = 0; k < vectors; ++k) cross[k] = 0;
  for (int64_t j = 0; j < block; ++j) {
    const float* v = columns + j * vectors;
    const float hx = h ? h[j] * x[j] : x[j];
    for (int64_t k = 0; k < vectors; ++k) cross[k] += hx * v[k];
  }
  if (!h) return;
  for (int64_t k = 0; k < vectors; ++k) power[k] = 0;
  for (int64_t j = 0; j < block; ++j) {
    const float *v = columns + j * vectors, weight = h[j];
    for (int64_t k = 0; k < vectors; ++k) power[k] += weight * (v[k] * v[k]);
  }
}

// 1 / power, 0 where that is no number: a vector of zeros helps nobody.
RS_CLONES void reciprocals(const float* power, int64_t vectors, float* inverse) {
  for (int64_t k = 0; k < vectors; ++k) inverse[k] = power[k] > 1e-30f ? 1.0f / power[k] : 0.0f;
}

// bound[k] = cross^2 / power: how far a multiple of v_k can lower the squared error. most[l] is the
// largest of those with k = l modulo kLanes.
RS_CLONES void bounds(const float* cross, const float* inverse, int64_t vectors, float* bound,
                      float* most) {
  float lanes[kLanes] = {};
  for (int64_t k = 0; k < vectors; k += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const float value = cross[k + l] * cross[k + l] * inverse[k + l];
      bound[k + l] = value;
      lanes[l] = value > lanes[l] ? value : lanes[l];
    }
  for (int l = 0; l < kLanes; ++l) most[l] = lanes[l];
}

template <class Word>
struct Search {
  static constexpr int kVectors = Word::kVectors;
  const Factors<Word>& factors;
  std::vector<float> columns;  // the basis, (block, vectors)
  float cross[kVectors], power[kVectors], inverse[kVectors], bound[kVectors], most[kLanes];
  double best;
  uint32_t word;

  Search(const Layer& layer, const Factors<Word>& factors)
      : factors(factors), columns(static_cast<size_t>(kVectors * layer.tile.cols)) {
    const int64_t block = layer.tile.cols;
    const float* basis = layer.params[kCyclicBasis];
    for (int64_t k = 0; k < kVectors; ++k)
      for (int64_t j = 0; j < block; ++j)
        columns[static_cast<size_t>(j * kVectors + k)] = basis[k * block + j];
    const std::vector<float> ones(static_cast<size_t>(block), 1.0f);
    project(ones.data(), ones.data(), columns.data(), block, kVectors, cross, power);
    reciprocals(power, kVectors, inverse);
  }

  void consider(int k) {
    const size_t at = factors.factor.find(cross[k] * inverse[k]);
    const double factor = factors.factor[at];
    const double gain = factor * (2.0 * cross[k] - factor * power[k]);
    if (!(gain > best)) return;
    best = gain;
    word = Word::pack(factors.code[at].phase, k, factors.code[at].amp);
  }

  // Exact: a vector is left out only when not even its best multiple would do.
  uint32_t run(const float* x, const float* h, int64_t block) {
    project(x, h, columns.data(), block, kVectors, cross, power);
    if (h) reciprocals(power, kVectors, inverse);
    bounds(cross, inverse, kVectors, bound, most);
    best = 0;
    word = 0;
    int lane = static_cast<int>(std::max_element(most, most + kLanes) - most);
    for (int step = 0; step < kLanes; ++step, lane = (lane + 1) % kLanes) {
      if (!(most[lane] > best)) continue;
      if (step == 0) consider(strongest(lane));
      for (int k = lane; k < kVectors; k += kLanes)
        if (bound[k] > best) consider(k);
    }
    return word;
  }
  int strongest(int lane) const {
    int at = lane;
    for (int k = lane; k < kVectors; k += kLanes)
      if (bound[k] > bound[at]) at = k;
    return at;
  }
};

}  // namespace

template <class Word>
void cyclic_encode(const Layer& layer, const float* w, const EncodeOptions& options, int64_t tile0,
                   int64_t tile1, uint8_t* codes, float* const*) {
  static const Factors<Word> factors(all_levels<Word>());
  Search<Word> search(layer, factors);
  const int64_t block = layer.tile.cols, n = layer.tile_cols();
  for (int64_t t = tile0; t < tile1; ++t) {
    const int64_t column = t % n * block;
    const float* h = options.importance ? options.importance + column : nullptr;
    const uint32_t word = search.run(w + t / n * layer.in + column, h, block);
    for (int i = 0; i < Word::kBytes; ++i)
      codes[t * Word::kBytes + i] = static_cast<uint8_t>(word >> 8 * i);
  }
}

template void cyclic_encode<Cyclic16Word>(const Layer&, const float*, const EncodeOptions&, int64_t,
                                          int64_t, uint8_t*, float* const*);
template void cyclic_encode<CyclicCompoundWord>(const Layer&, const float*, const EncodeOptions&,
                                                int64_t, int64_t, uint8_t*, float* const*);
template void cyclic_encode<Cyclic32Word>(const Layer&, const float*, const EncodeOptions&, int64_t,
                                          int64_t, uint8_t*, float* const*);

}  // namespace rs
