// Every block gets the basis vector and the factor that are best together: for each vector b the
// best factor is c = <w, b> / <b, b>, the nearest value of the merged sorted table is what a code
// can say, and the squared error falls by <w, b>^2/<b, b> - <b, b> (c - value)^2. All products and
// sums are in a fixed order, so every instruction set writes the same bytes.
#include <algorithm>
#include <cmath>
#include <mutex>
#include <numeric>

#include "../cpu/clones.h"
#include "bitfield.h"

namespace rs {
namespace {

// Table values of the allowed functions in rising order, each once, with their entries.
class FactorSearch {
 public:
  FactorSearch(int word, float r_max, uint64_t functions, int (*function)(uint32_t)) {
    const auto table = radial_table(word, r_max);
    std::vector<uint32_t> order;
    for (uint32_t e = 0; e < table->value.size(); ++e)
      if (functions >> function(e) & 1) order.push_back(e);
    const float* v = table->value.data();
    std::sort(order.begin(), order.end(),
              [v](uint32_t a, uint32_t b) { return v[a] != v[b] ? v[a] < v[b] : a < b; });
    for (uint32_t e : order)
      if (values_.empty() || v[e] != values_.back()) {
        values_.push_back(v[e]);
        entries_.push_back(e);
      }
    size_t at = 0;
    for (uint32_t bucket = 0; bucket <= kBuckets; ++bucket) {
      while (at < values_.size() && key(values_[at]) >> kShift < bucket) ++at;
      first_.push_back(static_cast<uint32_t>(at));
    }
  }

  float low() const { return values_.front(); }
  float high() const { return values_.back(); }
  size_t size() const { return values_.size(); }
  float value(size_t i) const { return values_[i]; }
  uint32_t entry(size_t i) const { return entries_[i]; }

  // Place of the first value that is not below c, or the last place.
  size_t above(float c) const {
    const uint32_t bucket = key(c) >> kShift;
    size_t at = first_[bucket], n = first_[bucket + 1] - at;
    for (size_t half; n; n -= half) {  // without a branch to mispredict
      half = (n + 1) / 2;
      at += values_[at + half - 1] < c ? half : 0;
    }
    return std::min(at, values_.size() - 1);
  }
  size_t nearest(float c) const {
    const size_t i = above(c);
    return i && c - values_[i - 1] <= values_[i] - c ? i - 1 : i;
  }

 private:
  static constexpr int kShift = 17;
  static constexpr uint32_t kBuckets = 1u << (32 - kShift);
  // Unsigned integers in the order of the floats; -0 counts as 0.
  static uint32_t key(float x) {
    const auto bits = std::bit_cast<uint32_t>(x + 0.0f);
    return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
  }
  std::vector<float> values_;
  std::vector<uint32_t> entries_, first_;
};

// Kept until another one is asked for: error feedback asks for the same one thousands of times.
template <class Codec>
std::shared_ptr<const FactorSearch> factor_search(int word, float r_max, uint64_t functions) {
  static std::mutex mutex;
  static float last_r_max;
  static uint64_t last_functions;
  static std::shared_ptr<const FactorSearch> last;
  const std::lock_guard lock(mutex);
  const float held = held_r_max(r_max);
  if (!last || last_r_max != held || last_functions != functions) {
    last = std::make_shared<const FactorSearch>(word, held, functions, Codec::function);
    last_r_max = held;
    last_functions = functions;
  }
  return last;
}

// p[k] = sum_j hw[j] * basis[j][k], the basis turned to (block, 256).
RS_CLONES void project(const float* hw, int64_t block, const float* basis, float* p) {
  constexpr int kLanes = 64;
  for (int k0 = 0; k0 < kBasis; k0 += kLanes) {
    float lanes[kLanes] = {};
    for (int64_t j = 0; j < block; ++j)
      for (int k = 0; k < kLanes; ++k) lanes[k] += hw[j] * basis[j * kBasis + k0 + k];
    for (int k = 0; k < kLanes; ++k) p[k0 + k] = lanes[k];
  }
}

// Vectors k, k + kGroups, k + 2 kGroups, ... are a group: its largest gain says whether to look.
constexpr int kGroups = 16;

// What the squared error falls by at most for each vector: the gain of the best factor that lies
// between low and high; and the largest of each group.
RS_CLONES void bound_gains(const float* p, const float* n, const float* inverse, float low,
                           float high, float* gain, float* most) {
  for (int g = 0; g < kGroups; ++g) most[g] = -INFINITY;
  for (int k0 = 0; k0 < kBasis; k0 += kGroups)
    for (int g = 0; g < kGroups; ++g) {
      const int k = k0 + g;
      float v = p[k] * inverse[k];
      v = v < low ? low : v;
      v = v > high ? high : v;
      gain[k] = v * (2 * p[k] - v * n[k]);
      most[g] = gain[k] > most[g] ? gain[k] : most[g];
    }
}

// 1 / n, or 0: a vector of zeros gains nothing.
RS_CLONES void invert(const float* n, float* inverse) {
  for (int k = 0; k < kBasis; ++k) inverse[k] = n[k] > 0 ? 1.0f / n[k] : 0.0f;
}

struct Choice {
  uint32_t code = 0;
  float value = 0;     // the factor
  float fraction = 0;  // amplitude uint16 and float32
};

template <int Word, Amplitude Width>
class BlockEncoder {
  using Codec = Bitfield<Word, Width>;
  static constexpr bool kWide = Width != Amplitude::byte;
  // Word 32 tries these phases until a product is as near as the basis can ever need.
  static constexpr uint32_t kPhaseStep = 8, kPhases = Word == 32 ? 8 : 1;
  static constexpr float kFine = 0x1p-14f;

 public:
  BlockEncoder(const Layer& layer, const EncodeOptions& options)
      : tables_(layer),
        search_(factor_search<Codec>(Word, layer.params[Codec::kRMax][0],
                                     bitfield_settings(*layer.spec).functions)),
        block_(layer.tile.cols / Codec::kCodes),
        importance_(options.importance),
        turned_(static_cast<size_t>(kBasis * block_)),
        squared_(turned_.size()),
        hw_(static_cast<size_t>(block_)) {
    for (int64_t j = 0; j < block_; ++j)
      for (int64_t k = 0; k < kBasis; ++k) {
        const float b = tables_.basis[k * block_ + j];
        turned_[static_cast<size_t>(j * kBasis + k)] = b;
        squared_[static_cast<size_t>(j * kBasis + k)] = b * b;
      }
    const std::vector<float> ones(static_cast<size_t>(block_), 1.0f);
    measure(ones.data());
  }

  // Block w of the columns from `col` on.
  Choice run(const float* w, int64_t col) {
    const float* h = importance_ ? importance_ + col : nullptr;
    for (int64_t j = 0; j < block_; ++j) hw_[static_cast<size_t>(j)] = h ? h[j] * w[j] : w[j];
    if (h) measure(h);
    project(hw_.data(), block_, turned_.data(), p_);
    bound_gains(p_, norm_, inverse_, search_->low(), search_->high(), gain_, most_);
    if constexpr (kWide) return between_entries(w, h);
    Choice best;
    const auto group = static_cast<int>(std::max_element(most_, most_ + kGroups) - most_);
    int first = group;
    while (first < kBasis && !(gain_[first] == most_[group])) first += kGroups;
    if (first >= kBasis) return best;  // of numbers too large to square
    float best_gain = try_vector(first, &best);
    each_at_least(best_gain, [&](int k) {
      Choice other;
      const float gain = k == first ? best_gain : try_vector(k, &other);
      if (gain > best_gain) best_gain = gain, best = other;
    });
    return best;
  }

 private:
  void measure(const float* h) {
    project(h, block_, squared_.data(), norm_);
    invert(norm_, inverse_);
  }

  // Visits every vector whose bound is at least `least`, which the visits may raise.
  template <class Visit>
  void each_at_least(const float& least, Visit&& visit) const {
    for (int g = 0; g < kGroups; ++g) {
      if (!(most_[g] >= least)) continue;
      for (int k = g; k < kBasis; k += kGroups)
        if (gain_[k] >= least) visit(k);
    }
  }

  float try_vector(int k, Choice* choice) const {
    const float c = p_[k] * inverse_[k], fine = kFine * std::abs(c);
    float least = INFINITY;
    for (uint32_t i = 0; i < kPhases && least > fine; ++i) {
      const float turn = tables_.cosine[i * kPhaseStep];
      const size_t at = search_->nearest(c / turn);
      const float value = Word == 32 ? mul(search_->value(at), turn) : search_->value(at);
      const float miss = std::abs(value - c);
      if (!(miss < least)) continue;
      least = miss;
      *choice = {Codec::code_of(search_->entry(at), static_cast<uint32_t>(k), i * kPhaseStep),
                 value, 0};
    }
    return choice->value * (2 * p_[k] - choice->value * norm_[k]);
  }

  // With factors this fine, all vectors that rounding cannot tell apart are tried in float64.
  Choice between_entries(const float* w, const float* h) const {
    const float most = *std::max_element(most_, most_ + kGroups);
    const float near = most - 1e-5f * std::abs(most);
    Choice best;
    double least = INFINITY;
    each_at_least(near, [&](int k) {
      const float* b = tables_.basis + k * block_;
      double p = 0, n = 0, error = 0;
      for (int64_t j = 0; j < block_; ++j) {
        const double weight = h ? h[j] : 1.0;
        p += weight * w[j] * b[j];
        n += weight * b[j] * b[j];
      }
      const Choice choice = interpolated(n > 0 ? p / n : 0.0, static_cast<uint32_t>(k));
      for (int64_t j = 0; j < block_; ++j) {
        const double miss = w[j] - double(choice.value) * b[j];
        error += (h ? h[j] : 1.0) * miss * miss;
      }
      if (error < least) least = error, best = choice;
    });
    return best;
  }

  // The factor nearest to c between neighbouring entries. Near c in the sorted table are entries of
  // functions that pass c on one side or the other: the nearest few always had one in practice, and
  // without one the nearest entry itself is taken.
  Choice interpolated(double c, uint32_t k) const {
    constexpr int kTried = 32;
    const auto target = static_cast<float>(c);
    const size_t nearest = search_->nearest(target), above = search_->above(target);
    Choice best{Codec::code_of(search_->entry(nearest), k, 0), search_->value(nearest), 0};
    for (size_t i = 0; i < 2 * kTried && best.value != target; ++i) {
      const size_t step = i / 2 + (i % 2 == 0);
      if (i % 2 ? above + step >= search_->size() : above < step) continue;
      const uint32_t e = search_->entry(i % 2 ? above + step : above - step);
      for (const uint32_t from : {e, e & 255 ? e - 1 : e}) {
        if ((from & 255) == 255) continue;
        const float low = tables_.value[from], high = tables_.value[from + 1];
        if ((low < c) == (high < c) || low == high) continue;
        const float t = held_fraction((c - low) / (double(high) - low));
        const float value = add(low, mul(t, add(high, -low)));
        if (std::abs(value - c) < std::abs(best.value - c))
          best = {Codec::code_of(from, k, 0), value, t};
      }
      // Any function that passes will do: its steps are 2^-16 of an entry's or finer.
      if (best.fraction != 0 && i >= 8) break;
    }
    return best;
  }
  static float held_fraction(double t) {
    if constexpr (Width == Amplitude::float32) return static_cast<float>(t);
    return static_cast<float>(std::min(std::floor(t * 65536 + 0.5), 65535.0) * 0x1p-16);
  }

  typename Codec::Tables tables_;
  std::shared_ptr<const FactorSearch> search_;
  int64_t block_;
  const float* importance_;
  std::vector<float> turned_, squared_, hw_;
  float norm_[kBasis], inverse_[kBasis], p_[kBasis], gain_[kBasis], most_[kGroups];
};

}  // namespace

template <int Word, Amplitude Width>
void bitfield_encode(const Layer& layer, const float* w, const EncodeOptions& options,
                     int64_t tile0, int64_t tile1, uint8_t* codes, float* const*) {
  using Codec = Bitfield<Word, Width>;
  const int64_t block = layer.tile.cols / Codec::kCodes, tiles = layer.tile_cols();
  BlockEncoder<Word, Width> encoder(layer, options);
  for (int64_t t = tile0; t < tile1; ++t) {
    const int64_t col = t % tiles * layer.tile.cols;
    const float* weights = w + t / tiles * layer.in + col;
    uint8_t* tile = codes + t * Codec::kBytes;
    for (int k = 0; k < Codec::kCodes; ++k) {
      const Choice choice = encoder.run(weights + k * block, col + k * block);
      Codec::put(tile, k, choice.code);
      if constexpr (Width == Amplitude::uint16) {
        const auto t16 = static_cast<uint16_t>(choice.fraction * 65536);
        std::memcpy(Codec::fraction_at(tile, k), &t16, sizeof t16);
      } else if constexpr (Width == Amplitude::float32) {
        std::memcpy(Codec::fraction_at(tile, k), &choice.fraction, sizeof choice.fraction);
      }
    }
  }
}

template decltype(bitfield_encode<22, Amplitude::byte>) bitfield_encode<22, Amplitude::byte>;
template decltype(bitfield_encode<22, Amplitude::uint16>) bitfield_encode<22, Amplitude::uint16>;
template decltype(bitfield_encode<22, Amplitude::float32>) bitfield_encode<22, Amplitude::float32>;
template decltype(bitfield_encode<32, Amplitude::byte>) bitfield_encode<32, Amplitude::byte>;

}  // namespace rs
