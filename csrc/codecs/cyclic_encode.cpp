#include "cyclic_encode.h"

#include <algorithm>
#include <map>

#include "../cpu/clones.h"

namespace rs {
namespace {

constexpr int kLanes = 16;

// The factors a word can have, in rising order, each with one of its codes.
template <class Word>
struct Levels {
  struct Code {
    int phase, amp;
  };
  std::vector<double> factor;
  std::vector<Code> code;
  std::vector<float> middle;  // between neighbours

  Levels() {
    std::map<int, Code> found;
    for (int amp = 0; amp < Word::kAmps; ++amp)
      for (int phase = 0; phase < 16; ++phase)
        found.try_emplace(kCyclic[0][phase] * amp, Code{phase, amp});
    for (const auto& [level, how] : found) {
      const double value = level / double{1 << Word::kShift};
      if (!factor.empty()) middle.push_back(static_cast<float>(0.5 * (factor.back() + value)));
      factor.push_back(value);
      code.push_back(how);
    }
  }
  size_t nearest(float value) const {
    return static_cast<size_t>(std::lower_bound(middle.begin(), middle.end(), value) -
                               middle.begin());
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

// bound[k] = cross^2 / power: how far a multiple of v_k can lower the squared error. most[l] is the
// largest of those with k = l modulo kLanes.
RS_CLONES void bounds(const float* cross, const float* power, int64_t vectors, float* bound,
                      float* most) {
  for (int l = 0; l < kLanes; ++l) most[l] = 0;
  for (int64_t k = 0; k < vectors; k += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const float p = power[k + l], c = cross[k + l];
      const float value = p > 0 ? c * c / p : 0.0f;
      bound[k + l] = value;
      most[l] = value > most[l] ? value : most[l];
    }
}

template <class Word>
struct Search {
  static constexpr int kVectors = Word::kVectors;
  const Levels<Word>& levels;
  std::vector<float> columns;  // the basis, (block, vectors)
  float cross[kVectors], power[kVectors], bound[kVectors], most[kLanes];
  double best;
  uint32_t word;

  Search(const Layer& layer, const Levels<Word>& levels)
      : levels(levels), columns(static_cast<size_t>(kVectors * layer.tile.cols)) {
    const int64_t block = layer.tile.cols;
    const float* basis = layer.params[kCyclicBasis];
    for (int64_t k = 0; k < kVectors; ++k)
      for (int64_t j = 0; j < block; ++j)
        columns[static_cast<size_t>(j * kVectors + k)] = basis[k * block + j];
    const std::vector<float> ones(static_cast<size_t>(block), 1.0f);
    project(ones.data(), ones.data(), columns.data(), block, kVectors, cross, power);
  }

  void consider(int k) {
    const size_t at = levels.nearest(cross[k] / power[k]);
    const double factor = levels.factor[at];
    const double gain = factor * (2.0 * cross[k] - factor * power[k]);
    if (!(gain > best)) return;
    best = gain;
    word = Word::pack(levels.code[at].phase, k, levels.code[at].amp);
  }

  // Exact: a vector is left out only when not even its best multiple would do.
  uint32_t run(const float* x, const float* h, int64_t block) {
    project(x, h, columns.data(), block, kVectors, cross, power);
    bounds(cross, power, kVectors, bound, most);
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
  static const Levels<Word> levels;
  Search<Word> search(layer, levels);
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
