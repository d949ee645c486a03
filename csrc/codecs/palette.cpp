#include "palette.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

#include "../cpu/clones.h"
#include "../cpu/fast.h"
#include "../cpu/half.h"
#include "../cpu/loops.h"
#include "../cpu/strips.h"
#include "palette_nearest.h"

namespace rs {
namespace {

constexpr int64_t kChunk = 512;  // weights searched at once, in the first cache

// How many of the middles lie below each weight.
RS_CLONES void ranks(const float* w, int64_t n, const float* middle, int middles, int32_t* rank) {
  for (int64_t i = 0; i < n; ++i) rank[i] = 0;
  for (int m = 0; m < middles; ++m) {
    const float border = middle[m];
    for (int64_t i = 0; i < n; ++i) rank[i] += w[i] > border;
  }
}

template <class Index>
void write_nearest(const float* w, int64_t n, const float* book, uint8_t* codes) {
  const SortedEntries sorted(book, Index::kEntries);
  int32_t rank[kChunk];
  for (int64_t i = 0; i < n; i += kChunk) {
    const int64_t count = std::min(kChunk, n - i);
    ranks(w + i, count, sorted.middle, sorted.count - 1, rank);
    for (int64_t j = 0; j < count; ++j) Index::write(codes, i + j, sorted.code[rank[j]]);
  }
}

// Pairs and their importance by component.
struct Pairs {
  float a[kChunk], b[kChunk], ha[kChunk], hb[kChunk];
};

RS_CLONES void nearest_pairs(const Pairs& p, int64_t n, const float* book, float* least,
                             int32_t* code) {
  for (int64_t i = 0; i < n; ++i) least[i] = INFINITY, code[i] = 0;
  for (int32_t e = 0; e < PairIndex::kEntries; ++e) {
    const float u = book[2 * e], v = book[2 * e + 1];
    for (int64_t i = 0; i < n; ++i) {
      const float cost = pair_cost(p.a[i], p.b[i], p.ha[i], p.hb[i], u, v);
      const bool better = cost < least[i];
      least[i] = better ? cost : least[i];
      code[i] = better ? e : code[i];
    }
  }
}

void write_nearest_pairs(const float* w, const float* h, int64_t n, const float* book,
                         uint8_t* codes) {
  Pairs p;
  float least[kChunk];
  int32_t code[kChunk];
  for (int64_t i = 0; i < n / 2; i += kChunk) {
    const int64_t count = std::min(kChunk, n / 2 - i);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t at = 2 * (i + j);
      p.a[j] = w[at], p.b[j] = w[at + 1], p.ha[j] = h[at], p.hb[j] = h[at + 1];
    }
    nearest_pairs(p, count, book, least, code);
    for (int64_t j = 0; j < count; ++j)
      PairIndex::write(codes, i + j, static_cast<uint32_t>(code[j]));
  }
}

// Lloyd's algorithm on the weights of one group: sorted, with running sums, so that a round costs a
// binary search per entry.
class GroupFit {
 public:
  void load(const float* w, const float* h, int64_t n) {
    order_.resize(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) order_[static_cast<size_t>(i)] = {w[i], h[i]};
    std::sort(order_.begin(), order_.end());
    mass_.assign(1, 0);
    moment_.assign(1, 0);
    power_.assign(1, 0);
    for (const auto& [x, weight] : order_) {
      mass_.push_back(mass_.back() + weight);
      moment_.push_back(moment_.back() + static_cast<double>(weight) * x);
      power_.push_back(power_.back() + static_cast<double>(weight) * x * x);
    }
  }

  // The better of two starts, quantiles of the importance and equal steps over the range, held to
  // float16 values.
  void fit(int entries, float* book) const {
    std::array<double, 16> best{}, now{};
    double least = std::numeric_limits<double>::infinity();
    const double low = order_.front().first, high = order_.back().first;
    for (int start = 0; start < 2; ++start) {
      for (int e = 0; e < entries; ++e) {
        const double part = (e + 0.5) / entries;
        const auto at = std::upper_bound(mass_.begin(), mass_.end() - 1, part * mass_.back()) - 1;
        now[e] = start ? low + part * (high - low)
                       : order_[static_cast<size_t>(at - mass_.begin())].first;
      }
      const double error = settle(entries, now.data());
      if (error < least) least = error, best = now;
    }
    const double peak = std::max(std::abs(low), std::abs(high));
    for (int e = 0; e < entries; ++e) book[e] = held(best[e], peak);
  }

 private:
  int64_t size() const { return static_cast<int64_t>(order_.size()); }

  // A float16 value, so that files store 16 bits: below the normal ones an entry among larger ones
  // takes the nearest multiple of 2^-24.
  static float held(double entry, double peak) {
    if (std::abs(entry) < 0x1p-14 && peak >= 0x1p-10 && peak < 65504)
      return static_cast<float>(std::nearbyint(entry * 0x1p24) * 0x1p-24);
    return round_to_half(static_cast<float>(entry));
  }

  // Rounds until the cells stay; returns the squared error of the last cells.
  double settle(int entries, double* book) const {
    constexpr int kRounds = 100;
    std::array<int64_t, 17> cut{}, next{};
    double error = 0;
    for (int round = 0; round < kRounds; ++round) {
      next[entries] = size();
      for (int e = 1; e < entries; ++e) {
        const double middle = 0.5 * book[e - 1] + 0.5 * book[e];
        next[e] = std::upper_bound(order_.begin(), order_.end(), middle,
                                   [](double m, const auto& x) { return m < x.first; }) -
                  order_.begin();
      }
      if (next == cut) break;
      cut = next;
      error = power_.back();
      for (int e = 0; e < entries; ++e) {
        const double mass = mass_[cut[e + 1]] - mass_[cut[e]];
        const double moment = moment_[cut[e + 1]] - moment_[cut[e]];
        if (mass <= 0) continue;
        book[e] = moment / mass;
        error -= moment * book[e];
      }
    }
    return error;
  }

  std::vector<std::pair<float, float>> order_;
  std::vector<double> mass_, moment_, power_;
};

template <class Index, bool Grouped>
void encode(const Layer& layer, const float* w, const EncodeOptions& options, int64_t tile0,
            int64_t tile1, uint8_t* codes, float* const* params) {
  const auto [rows, cols, bytes] = layer.tile;
  GroupFit group;
  for_each_strip(layer, w, options, tile0, tile1,
                 [&](int64_t tile, int64_t count, const float* strip, const float* h) {
                   uint8_t* at = codes + tile * bytes;
                   if constexpr (Grouped) {
                     for (int64_t i = 0; i < count; ++i, strip += cols, h += cols, at += bytes) {
                       float* book = params[0] + (tile + i) * Index::kEntries;
                       group.load(strip, h, cols);
                       group.fit(Index::kEntries, book);
                       write_nearest<Index>(strip, cols, book, at);
                     }
                   } else if constexpr (Index::kUnit == 2) {
                     write_nearest_pairs(strip, h, count * cols, layer.params[0], at);
                   } else {
                     write_nearest<Index>(strip, count * cols, layer.params[0], at);
                   }
                 });
}

void check_words(const Layer& layer, int64_t tile) {
  const uint8_t* bytes = layer.codes + tile * layer.tile.bytes;
  for (int64_t i = 1; i < layer.tile.bytes; i += 2)
    if (bytes[i] & 0x80) throw std::invalid_argument("bit 15 of a word must be zero");
}

void check_padding(const Layer& layer, int64_t tile, int bits) {
  const int64_t used = layer.tile.cols * bits % 8;
  const uint8_t* bytes = layer.codes + tile * layer.tile.bytes;
  if (used && bytes[layer.tile.bytes - 1] >> used)
    throw std::invalid_argument("the padding bits after a group must be zero");
}

template <class Index>
void fill(Row& row, bool grouped) {
  row.decode = grouped ? decode_loop<Palette<Index, true>> : decode_loop<Palette<Index, false>>;
  row.adjoint = grouped ? adjoint_loop<Palette<Index, true>> : adjoint_loop<Palette<Index, false>>;
  row.encode = grouped ? encode<Index, true> : encode<Index, false>;
}

template <int Bits>
void fill_dense(Row& row, bool grouped) {
  fill<DenseIndex<Bits>>(row, grouped);
  if (grouped)
    row.check = [](const Layer& layer, int64_t tile) { check_padding(layer, tile, Bits); };
}

// Bits per weight: the layout's own where the spec names none.
double bits_of(const Spec& spec, const std::string& layout) {
  const double own = layout == "pair" ? 2.5 : 3;
  const double bits = spec.number("bits", own);
  if (layout == "dense" && (bits != std::floor(bits) || bits < 1 || bits > 4))
    throw std::invalid_argument("palette: bits must be a whole number from 1 to 4, got " +
                                spec.word("bits", ""));
  if (layout != "dense" && bits != own)
    throw std::invalid_argument("palette: bits must be " +
                                std::string(layout == "pair" ? "2.5" : "3") +
                                " with layout=" + layout + ", got " + spec.word("bits", ""));
  return bits;
}

int64_t group_of(const Spec& spec, const std::string& layout) {
  const double group = spec.number("group", 0);
  if (group != std::floor(group) || group < 0 || group > (1 << 20))
    throw std::invalid_argument("palette: group must be a whole number from 0 to 1048576, got " +
                                spec.word("group", ""));
  const auto whole = static_cast<int64_t>(group);
  if (layout == "pair" && whole != 0)
    throw std::invalid_argument("palette: group must be 0 with layout=pair, got " +
                                spec.word("group", ""));
  if (layout == "words" && whole % 5 != 0)
    throw std::invalid_argument("palette: group must be a multiple of 5 with layout=words, got " +
                                spec.word("group", ""));
  return whole;
}

}  // namespace

std::vector<Term> palette_terms(const Spec& spec, Shape shape) {
  spec.only({"layout", "bits", "group"});
  const std::string layout = spec.word("layout", "dense");
  if (layout != "dense" && layout != "words" && layout != "pair")
    throw std::invalid_argument("palette: layout must be dense, words or pair, got '" + layout +
                                "'");
  const double bits = bits_of(spec, layout);
  const int64_t group = group_of(spec, layout);
  const bool grouped = group != 0;
  Term term;
  Row& row = term.row;
  row.name = "palette";
  if (layout == "pair") {
    row.tile = {1, 16, 5};
    fill<PairIndex>(row, false);
  } else if (layout == "words") {
    row.tile = grouped ? Tile{1, group, group / 5 * 2} : Tile{1, 5, 2};
    row.check = check_words;
    fill<WordIndex>(row, grouped);
  } else {
    const auto whole = static_cast<int64_t>(bits);
    const int64_t least = 8 / std::gcd<int64_t>(8, whole);
    row.tile = {1, grouped ? group : least, ((grouped ? group : least) * whole + 7) / 8};
    constexpr void (*kFill[])(Row&, bool) = {fill_dense<1>, fill_dense<2>, fill_dense<3>,
                                             fill_dense<4>};
    kFill[whole - 1](row, grouped);
  }
  const int64_t entries = layout == "pair" ? 32 : int64_t{1} << static_cast<int>(bits);
  if (grouped) {
    row.params = {
        {"codebook", Axis::both, {shape.out, round_up(shape.in, group) / group, entries}}};
  } else {
    row.params.push_back({"codebook", Axis::shared, {entries}});
    if (layout == "pair") row.params[0].sizes.push_back(2);
    row.params.push_back({"out_scale", Axis::out, {shape.out}});
    row.out_scale = 1;
  }
  row.encode_batch = std::max<int64_t>(1, 8192 / row.tile.cols);
  const PaletteLayout kind = layout == "pair"    ? PaletteLayout::pair
                             : layout == "words" ? PaletteLayout::words
                                                 : PaletteLayout::dense;
  palette_fast_slots(row, kind, static_cast<int>(bits), grouped, current_isa());
  return {term};
}

}  // namespace rs
