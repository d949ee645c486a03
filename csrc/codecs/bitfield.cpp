#include "bitfield.h"

#include <cmath>

#include "../cpu/bitfield_slots.h"
#include "../cpu/fast.h"
#include "../trig.h"

namespace rs {
namespace {

template <class Codec, class Visit>
void for_each_code(const Layer& layer, int64_t row0, int64_t row1, Visit&& visit) {
  const int64_t block = layer.tile.cols / Codec::kCodes, tiles = layer.tile_cols();
  const uint8_t* tile = layer.codes + row0 * tiles * Codec::kBytes;
  int64_t at = 0;
  for (int64_t t = 0; t < (row1 - row0) * tiles; ++t, tile += Codec::kBytes)
    for (int k = 0; k < Codec::kCodes; ++k, at += block)
      visit(tile, k, Codec::code(tile, k), at, block);
}

template <class Codec>
void decode(const Layer& layer, int64_t row0, int64_t row1, float* w) {
  const typename Codec::Tables t(layer);
  for_each_code<Codec>(layer, row0, row1,
                       [&](const uint8_t* tile, int k, uint32_t code, int64_t at, int64_t block) {
                         const float f = Codec::factor(tile, k, code, t.value, t.cosine);
                         const float* b = t.basis + Codec::index(code) * block;
                         for (int64_t j = 0; j < block; ++j) w[at + j] = mul(f, b[j]);
                       });
}

template <class Codec>
void adjoint(const Layer& layer, int64_t row0, int64_t row1, const float* dw, float* const* grads) {
  const typename Codec::Tables t(layer);
  float *basis_grad = grads[Codec::kBasisParam], *r_max_grad = grads[Codec::kRMax];
  double r_max_sum = 0;
  for_each_code<Codec>(
      layer, row0, row1, [&](const uint8_t* tile, int k, uint32_t code, int64_t at, int64_t block) {
        const int64_t first = Codec::index(code) * block;
        if (basis_grad) {
          const float f = Codec::factor(tile, k, code, t.value, t.cosine);
          for (int64_t j = 0; j < block; ++j) basis_grad[first + j] += f * dw[at + j];
        }
        if (r_max_grad) {
          float dot = 0;
          for (int64_t j = 0; j < block; ++j) dot += t.basis[first + j] * dw[at + j];
          r_max_sum += double(Codec::factor(tile, k, code, t.slope, t.cosine)) * dot;
        }
      });
  if (r_max_grad && t.trains_r_max) r_max_grad[0] += static_cast<float>(r_max_sum);
}

template <class Codec>
void check(const Layer& layer, int64_t tile_index) {
  const uint8_t* tile = layer.codes + tile_index * Codec::kBytes;
  const uint64_t functions = bitfield_settings(*layer.spec).functions;
  for (int k = 0; k < Codec::kCodes; ++k) {
    if (!(functions >> Codec::function(Codec::entry(Codec::code(tile, k))) & 1))
      throw std::invalid_argument("a code names a function that is not in the setting functions");
    if constexpr (Codec::kWidth == 4) {
      const float t = Codec::stored_fraction(tile, k);
      if (!(t >= 0 && t <= 1)) throw std::invalid_argument("a fraction must be from 0 to 1");
    }
  }
}

[[noreturn]] void bad_functions(const std::string& text, int word) {
  throw std::invalid_argument(
      "bitfield: functions must be all, or some of poincare, lorentz, klein, special and c0s0d0 to "
      "c3s3d" +
      std::string(word == 22 ? "3" : "1") + " joined by _, got '" + text + "'");
}

uint64_t parse_functions(const std::string& text, int word) {
  const uint64_t usable = word == 22 ? ~uint64_t{0} : 0x3333333333333333;
  constexpr const char* kCategories[] = {"poincare", "lorentz", "klein", "special"};
  uint64_t found = 0;
  for (size_t at = 0; at <= text.size();) {
    const size_t end = std::min(text.find('_', at), text.size());
    const std::string item = text.substr(at, end - at);
    uint64_t functions = item == "all" ? ~uint64_t{0} : 0;
    for (int c = 0; c < 4; ++c)
      if (item == kCategories[c]) functions = uint64_t{0xFFFF} << 16 * c;
    const auto digit = [&](size_t i) { return item[i] >= '0' && item[i] <= '3'; };
    if (item.size() == 6 && item[0] == 'c' && item[2] == 's' && item[4] == 'd' && digit(1) &&
        digit(3) && digit(5))
      functions = uint64_t{1} << (16 * (item[1] - '0') + 4 * (item[3] - '0') + item[5] - '0');
    if (!(functions & usable)) bad_functions(text, word);
    found |= functions & usable;
    at = end + 1;
  }
  return found;
}

template <int Word, Amplitude Width>
void fill(Row& row, int64_t block, uint64_t functions) {
  using Codec = Bitfield<Word, Width>;
  row.tile = {1, Codec::kCodes * block, Codec::kBytes};
  row.decode = decode<Codec>;
  row.adjoint = adjoint<Codec>;
  row.encode = bitfield_encode<Word, Width>;
  fill_slots<Codec>(row);
  bitfield_fast_slots(row, Word, Width, current_isa());
  const uint64_t all = Word == 22 ? ~uint64_t{0} : 0x3333333333333333;
  if (functions != all || Width == Amplitude::float32) row.check = check<Codec>;
}

}  // namespace

const std::array<float, 256>& bitfield_cosines() {
  static const std::array<float, 256> table = [] {
    std::array<float, 256> t;
    for (uint64_t p = 0; p < 256; ++p) t[p] = static_cast<float>(turn_cosine(p, 256));
    return t;
  }();
  return table;
}

BitfieldSettings bitfield_settings(const Spec& spec) {
  spec.only({"word", "amplitude", "basis", "block", "functions", "r_max"});
  const double word = spec.number("word", 22), block = spec.number("block", 8);
  if (word != 22 && word != 32)
    throw std::invalid_argument("bitfield: word must be 22 or 32, got " + spec.word("word", ""));
  const std::string amplitude = spec.word("amplitude", "byte"),
                    basis = spec.word("basis", "kmeans");
  if (amplitude != "byte" && amplitude != "uint16" && amplitude != "float32")
    throw std::invalid_argument("bitfield: amplitude must be byte, uint16 or float32, got '" +
                                amplitude + "'");
  if (amplitude != "byte" && word != 22)
    throw std::invalid_argument("bitfield: amplitude=" + amplitude + " needs word=22");
  if (basis != "kmeans" && basis != "svd")
    throw std::invalid_argument("bitfield: basis must be kmeans or svd, got '" + basis + "'");
  if (block != std::floor(block) || block < 1 || block > (1 << 20))
    throw std::invalid_argument("bitfield: block must be a whole number from 1 to 1048576, got " +
                                spec.word("block", ""));
  const double r_max = spec.number("r_max", 0);
  if (r_max != 0 && !(r_max >= kLeastRadius && r_max <= kLargestRadius))
    throw std::invalid_argument("bitfield: r_max must be 0 (fitted) or from 0.5 to 8, got " +
                                spec.word("r_max", ""));
  return {static_cast<int>(word),
          amplitude == "byte"     ? Amplitude::byte
          : amplitude == "uint16" ? Amplitude::uint16
                                  : Amplitude::float32,
          static_cast<int64_t>(block),
          parse_functions(spec.word("functions", "all"), static_cast<int>(word))};
}

std::vector<Term> bitfield_terms(const Spec& spec, Shape shape) {
  const BitfieldSettings settings = bitfield_settings(spec);
  Term term;
  Row& row = term.row;
  row.name = "bitfield";
  row.params = {{"basis", Axis::shared, {kBasis, settings.block}},
                {"r_max", Axis::shared, {1}},
                {"out_scale", Axis::out, {shape.out}}};
  row.out_scale = 2;
  const auto choose = settings.word == 32                       ? fill<32, Amplitude::byte>
                      : settings.amplitude == Amplitude::byte   ? fill<22, Amplitude::byte>
                      : settings.amplitude == Amplitude::uint16 ? fill<22, Amplitude::uint16>
                                                                : fill<22, Amplitude::float32>;
  choose(row, settings.block, settings.functions);
  row.encode_batch = std::max<int64_t>(1, 4096 / row.tile.cols);
  return {term};
}

}  // namespace rs
