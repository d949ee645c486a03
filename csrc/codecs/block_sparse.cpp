#include "block_sparse.h"

#include <algorithm>
#include <cmath>

#include "../cpu/block_sparse_fast.h"
#include "../cpu/clones.h"
#include "../cpu/loops.h"
#include "../cpu/widths.h"

namespace rs {
namespace {

constexpr int kLanes = 16;  // tiles searched at once, each in a lane of its own

// The int8 nearest to x / scale; 0 for a scale that is none.
int8_t nearest(float x, float inverse) {
  return static_cast<int8_t>(std::nearbyint(std::clamp(x * inverse, -127.0f, 127.0f)));
}
float inverse_of(float scale) {
  const float inverse = 1 / scale;
  return std::isfinite(inverse) ? inverse : 0.0f;
}

// --- square ---

// Of the 16 weights of kLanes tiles; the last is zero.
struct Energies {
  alignas(64) float of[17][kLanes];
};

// For each lane the mask that keeps most energy, the first of equals. `ones` lists those of each
// mask, what it lacks as 16.
template <int L>
RS_INLINE void best_masks(const Energies& energy, const uint8_t (*ones)[4], int32_t* index) {
  for (int first = 0; first < kLanes; first += L) {
    VectorOf<float, L> best = at<float, L>(energy.of[16] + first) - 1;
    VectorOf<int32_t, L> found = {};
    for (int32_t m = 0; m < 256; ++m) {
      VectorOf<float, L> of[4];
      for (int i = 0; i < 4; ++i) of[i] = at<float, L>(energy.of[ones[m][i]] + first);
      const VectorOf<float, L> kept = (of[0] + of[1]) + (of[2] + of[3]);
      const VectorOf<int32_t, L> better = kept > best;
      found = better ? m + VectorOf<int32_t, L>{} : found;
      best = better ? kept : best;
    }
    at<int32_t, L>(index + first) = found;
  }
}

// The four largest of a lane, the first of equals.
uint32_t largest_four(const Energies& energy, int lane) {
  uint32_t mask = 0;
  for (int n = 0; n < 4; ++n) {
    int best = -1;
    for (int p = 0; p < 16; ++p)
      if (!(mask >> p & 1) && (best < 0 || energy.of[p][lane] > energy.of[best][lane])) best = p;
    mask |= 1u << best;
  }
  return mask;
}

template <bool Mask16>
void encode_square(const Layer& layer, const float* w, const EncodeOptions& options, int64_t tile0,
                   int64_t tile1, uint8_t* codes, float* const*) {
  using Codec = SquareSparse<Mask16>;
  const typename Codec::Tables tables(layer);
  const float inverse = inverse_of(tables.scale);
  uint8_t ones[256][4];
  if constexpr (!Mask16)
    for (int m = 0; m < 256; ++m) {
      uint32_t rest = tables.masks[m];
      for (uint8_t& place : ones[m]) {
        place = static_cast<uint8_t>(rest ? std::countr_zero(rest) : 16);
        rest &= rest - 1;
      }
    }
  for (int64_t first = tile0; first < tile1; first += kLanes) {
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes, tile1 - first));
    float target[16][kLanes] = {};
    Energies energy = {};
    int32_t index[kLanes] = {};
    for (int l = 0; l < lanes; ++l) {
      const int64_t row = (first + l) / layer.tile_cols() * 4,
                    col = (first + l) % layer.tile_cols() * 4;
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
          const float x = w[(row + i) * layer.in + col + j];
          const float h = options.importance ? options.importance[col + j] : 1.0f;
          target[4 * i + j][l] = x;
          // Beyond the float32 range of squares all are as large: keep them finite.
          energy.of[4 * i + j][l] = std::min(h * x * x, 1e37f);
        }
    }
    if constexpr (!Mask16) by_width([&]<int L>() RS_LAMBDA { best_masks<L>(energy, ones, index); });
    for (int l = 0; l < lanes; ++l) {
      uint8_t* tile = codes + (first + l) * Codec::kBytes;
      uint32_t mask;
      if constexpr (Mask16) {
        mask = largest_four(energy, l);
        tile[0] = static_cast<uint8_t>(mask);
        tile[1] = static_cast<uint8_t>(mask >> 8);
      } else {
        tile[0] = static_cast<uint8_t>(index[l]);
        mask = tables.masks[index[l]];
      }
      for (uint8_t* value = tile + Codec::kValues; mask; mask &= mask - 1)
        *value++ = static_cast<uint8_t>(nearest(target[std::countr_zero(mask)][l], inverse));
    }
  }
}

void check_patterns(const Layer& layer, int64_t tile) {
  const uint8_t* mask =
      reinterpret_cast<const uint8_t*>(layer.params[SquareSparse<false>::kMasks]) +
      2 * layer.codes[tile * SquareSparse<false>::kBytes];
  if (std::popcount(static_cast<uint32_t>(mask[0] | mask[1] << 8)) != 4)
    throw std::invalid_argument("its pattern's mask must have four ones");
}

void check_mask16(const Layer& layer, int64_t tile) {
  const uint8_t* bytes = layer.codes + tile * SquareSparse<true>::kBytes;
  const int ones = std::popcount(static_cast<uint32_t>(bytes[0] | bytes[1] << 8));
  if (ones > 4) throw std::invalid_argument("a mask must have at most four ones");
  for (int n = ones; n < 4; ++n)
    if (bytes[2 + n]) throw std::invalid_argument("values without a one in the mask must be zero");
}

// --- row ---

// Least squares of kLanes blocks against every mask, size and phase at once. For a phase and a
// size b the mask keeps the j with 0 < b c_j < 2 w_j (or the mirror image), so that the best masks
// of a phase are runs from either end of the order of w_j / c_j: 15 sums instead of 256.
struct RowSearch {
  alignas(64) float w[8][kLanes] = {}, h[8][kLanes] = {}, size[kLanes] = {};
  int32_t phase[kLanes] = {};
};

// Exchanges that sort eight values (Batcher).
constexpr uint8_t kSort[19][2] = {{0, 1}, {2, 3}, {4, 5}, {6, 7}, {0, 2}, {1, 3}, {4, 6},
                                  {5, 7}, {1, 2}, {5, 6}, {0, 4}, {1, 5}, {2, 6}, {3, 7},
                                  {2, 4}, {3, 5}, {1, 2}, {3, 4}, {5, 6}};

// Phases 0 to 127: half a turn more is the other sign of the size. `largest` bounds |size|.
// Lanes `first` to first + L - 1.
template <int L>
RS_INLINE void search_phases(RowSearch& s, int first, const float (*cosines)[8], float largest) {
  using Floats = VectorOf<float, L>;
  using Ints = VectorOf<int32_t, L>;
  Floats w[8], h[8], found_size = {}, found_gain = {};
  Ints found_phase = {};
  for (int j = 0; j < 8; ++j) {
    w[j] = at<float, L>(s.w[j] + first);
    h[j] = at<float, L>(s.h[j] + first);
  }
  const Floats most = largest + Floats{}, least = -most;
  for (int32_t phase = 0; phase < 128; ++phase) {
    const float* cosine = cosines[phase];
    Floats ratio[8], along[8], power[8];
    for (int j = 0; j < 8; ++j) {
      const float c = cosine[j], inverse = c != 0 ? 1 / c : 0;
      const Floats hc = h[j] * c;
      ratio[j] = w[j] * inverse;
      along[j] = hc * w[j];
      power[j] = hc * c;
    }
#pragma GCC unroll 19
    for (const auto& [i, j] : kSort) {
      const Ints swap = ratio[i] < ratio[j];
      const Floats r = ratio[i], a = along[i], p = power[i];
      ratio[i] = swap ? ratio[j] : r, ratio[j] = swap ? r : ratio[j];
      along[i] = swap ? along[j] : a, along[j] = swap ? a : along[j];
      power[i] = swap ? power[j] : p, power[j] = swap ? p : power[j];
    }
    Floats size = {}, gain = {};
    for (int end = 0; end < 2; ++end) {
      Floats a = {}, p = 1e-30f + Floats{};
#pragma GCC unroll 8
      for (int n = 0; n < 8; ++n) {
        const int j = end ? 7 - n : n;
        a += along[j], p += power[j];
        Floats b = a / p;
        b = b < most ? b : most;
        b = b > least ? b : least;
        const Floats more = b * (2 * a - b * p);
        const Ints better = more > gain;
        gain = better ? more : gain;
        size = better ? b : size;
      }
    }
    const Ints better = gain > found_gain;
    found_gain = better ? gain : found_gain;
    found_size = better ? size : found_size;
    found_phase = better ? phase + Ints{} : found_phase;
  }
  at<float, L>(s.size + first) = found_size;
  at<int32_t, L>(s.phase + first) = found_phase;
}

// The mask that is best for a size and phase, and by how much it lowers the error.
float best_mask(const RowSearch& s, int lane, float size, const float* cosine, uint8_t* mask) {
  float gain = 0;
  *mask = 0;
  for (int j = 0; j < 8; ++j) {
    const float v = size * cosine[j], more = s.h[j][lane] * v * (2 * s.w[j][lane] - v);
    if (!(more > 0)) continue;
    gain += more;
    *mask = static_cast<uint8_t>(*mask | 1 << j);
  }
  return gain;
}

void encode_row(const Layer& layer, const float* w, const EncodeOptions& options, int64_t tile0,
                int64_t tile1, uint8_t* codes, float* const*) {
  const RowSparse::Tables tables(layer);
  const float scale = std::abs(tables.scale), inverse = inverse_of(tables.scale);
  for (int64_t first = tile0; first < tile1; first += kLanes) {
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes, tile1 - first));
    RowSearch s;
    for (int l = 0; l < lanes; ++l)
      for (int j = 0; j < 8; ++j) {
        const int64_t at = (first + l) * 8 + j;  // tiles follow each other along the rows
        s.w[j][l] = std::clamp(w[at], -1e15f, 1e15f);
        s.h[j][l] = options.importance ? options.importance[at % layer.in] : 1.0f;
      }
    by_width([&]<int L>() RS_LAMBDA {
      for (int l = 0; l < kLanes; l += L) search_phases<L>(s, l, tables.cosine.at, 127 * scale);
    });
    for (int l = 0; l < lanes; ++l) {
      uint8_t* tile = codes + (first + l) * 3;
      const float* cosine = tables.cosine.at[s.phase[l]];
      const int middle = nearest(s.size[l], inverse);
      float best = 0;
      for (int base = std::max(-127, middle - 1); base <= std::min(127, middle + 1); ++base) {
        uint8_t mask;
        const float gain = best_mask(s, l, static_cast<float>(base) * tables.scale, cosine, &mask);
        if (!(gain > best)) continue;
        best = gain;
        tile[0] = mask;
        tile[1] = static_cast<uint8_t>(base);
        tile[2] = static_cast<uint8_t>(s.phase[l]);
      }
    }
  }
}

}  // namespace

RS_CLONES double wide_dot(const float* a, const float* b, int64_t n) {
  constexpr int64_t kLanes = 16;  // partial sums in a fixed order, whatever the vector width
  double lanes[kLanes] = {}, sum = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane)
      lanes[lane] += static_cast<double>(a[i + lane]) * b[i + lane];
  for (; i < n; ++i) lanes[i % kLanes] += static_cast<double>(a[i]) * b[i];
  for (double lane : lanes) sum += lane;
  return sum;
}

std::vector<Term> block_sparse_terms(const Spec& spec, Shape shape) {
  spec.only({"layout", "mask16"});
  const std::string layout = spec.word("layout", "square");
  const bool square = layout == "square", mask16 = spec.flag("mask16", false);
  if (!square && layout != "row")
    throw std::invalid_argument("block_sparse: layout must be square or row, got " + layout);
  if (mask16 && !square)
    throw std::invalid_argument("block_sparse: mask16 is a setting of layout=square");
  Term term;
  Row& row = term.row;
  row.name = "block_sparse";
  row.params.push_back({"value_scale", Axis::shared, {1}});
  if (square && !mask16) row.params.push_back({"masks", Axis::shared, {256, 2}, true});
  row.out_scale = static_cast<int>(row.params.size());
  row.params.push_back({"out_scale", Axis::out, {shape.out}});
  if (!square) {
    row.tile = {1, 8, 3};
    row.decode = decode_loop<RowSparse>;
    row.adjoint = adjoint_loop<RowSparse>;
    row.encode = encode_row;
  } else if (mask16) {
    row.tile = {4, 4, 6};
    row.decode = decode_loop<SquareSparse<true>>;
    row.adjoint = adjoint_loop<SquareSparse<true>>;
    row.encode = encode_square<true>;
    row.check = check_mask16;
  } else {
    row.tile = {4, 4, 5};
    row.decode = decode_loop<SquareSparse<false>>;
    row.adjoint = adjoint_loop<SquareSparse<false>>;
    row.encode = encode_square<false>;
    row.check = check_patterns;
  }
  row.encode_batch = 256;
  block_sparse_fast_slots(row, square, mask16, current_isa());
  return {term};
}

}  // namespace rs
