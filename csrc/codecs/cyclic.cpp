#include "cyclic.h"

#include <algorithm>
#include <cmath>

#include "../cpu/clones.h"
#include "../cpu/cyclic_product.h"
#include "../cpu/half.h"
#include "cyclic_encode.h"

namespace rs {
namespace {

// Indices and factors of one row's codes.
struct RowCodes {
  std::vector<int32_t> index;
  std::vector<float> factor;

  explicit RowCodes(const Layer& layer)
      : index(static_cast<size_t>(layer.tile_cols())), factor(index.size()) {}
  template <class Word>
  void read(const Layer& layer, int64_t row) {
    const uint8_t* bytes = layer.codes + row * layer.tile_cols() * Word::kBytes;
    for (size_t c = 0; c < index.size(); ++c, bytes += Word::kBytes) {
      const uint32_t word = cyclic_word<Word>(bytes);
      index[c] = Word::index(word);
      factor[c] = mul(static_cast<float>(cyclic_level<Word>(word)), 1.0f / (1 << Word::kShift));
    }
  }
};

inline void put(float* w, float value) { *w = value; }
inline void put(uint16_t* w, float value) { *w = to_bf16(value); }

// Blocks of the usual length have it as a constant.
template <class T>
inline __attribute__((always_inline)) void expand(const RowCodes& codes, const float* basis,
                                                  int64_t block, T* w) {
  const size_t n = codes.index.size();
  if (block == 8) {
    for (size_t c = 0; c < n; ++c, w += 8) {
      const float *vector = basis + int64_t{codes.index[c]} * 8, factor = codes.factor[c];
      for (int j = 0; j < 8; ++j) put(w + j, mul(factor, vector[j]));
    }
    return;
  }
  for (size_t c = 0; c < n; ++c, w += block) {
    const float *vector = basis + codes.index[c] * block, factor = codes.factor[c];
    for (int64_t j = 0; j < block; ++j) put(w + j, mul(factor, vector[j]));
  }
}
RS_CLONES void expand_float(const RowCodes& codes, const float* basis, int64_t block, float* w) {
  expand(codes, basis, block, w);
}
RS_CLONES void expand_bf16(const RowCodes& codes, const float* basis, int64_t block, uint16_t* w) {
  expand(codes, basis, block, w);
}

template <class Word>
void decode(const Layer& layer, int64_t row0, int64_t row1, float* w) {
  RowCodes codes(layer);
  for (int64_t r = row0; r < row1; ++r, w += layer.in) {
    codes.read<Word>(layer, r);
    expand_float(codes, layer.params[kCyclicBasis], layer.tile.cols, w);
  }
}
template <class Word>
void decode_bf16(const Layer& layer, int64_t row0, int64_t row1, uint16_t* w) {
  RowCodes codes(layer);
  for (int64_t r = row0; r < row1; ++r, w += layer.in) {
    codes.read<Word>(layer, r);
    expand_bf16(codes, layer.params[kCyclicBasis], layer.tile.cols, w);
  }
}

RS_CLONES void accumulate(const RowCodes& codes, const float* dw, int64_t block, float* grad) {
  for (size_t c = 0; c < codes.index.size(); ++c, dw += block) {
    float *vector = grad + codes.index[c] * block, factor = codes.factor[c];
    for (int64_t j = 0; j < block; ++j) vector[j] += factor * dw[j];
  }
}
template <class Word>
void adjoint(const Layer& layer, int64_t row0, int64_t row1, const float* dw, float* const* grads) {
  if (!grads[kCyclicBasis]) return;
  RowCodes codes(layer);
  for (int64_t r = row0; r < row1; ++r, dw += layer.in) {
    codes.read<Word>(layer, r);
    accumulate(codes, dw, layer.tile.cols, grads[kCyclicBasis]);
  }
}

template <class Word>
void check(const Layer& layer, int64_t tile) {
  if (cyclic_word<Word>(layer.codes + tile * Word::kBytes) & Word::kReserved)
    throw std::invalid_argument("the reserved bits 16 to 25 must be zero");
}

template <class Word>
void fill(Row& row, int64_t block, bool integers) {
  row.tile = {1, block, Word::kBytes};
  row.params.push_back({"basis", Axis::shared, {Word::kVectors, block}});
  row.decode = decode<Word>;
  row.decode_bf16 = decode_bf16<Word>;
  row.adjoint = adjoint<Word>;
  row.encode = cyclic_encode<Word>;
  if (Word::kReserved) row.check = check<Word>;
  cyclic_product_slots<Word>(row, integers, current_isa());
}

}  // namespace

std::vector<Term> cyclic_terms(const Spec& spec, Shape shape) {
  spec.only({"word", "compound", "activation", "block"});
  const double word = spec.number("word", 16), wanted = spec.number("block", 8);
  const bool compound = spec.flag("compound", false);
  const std::string activation = spec.word("activation", "float");
  if (word != 16 && word != 32)
    throw std::invalid_argument("cyclic: word must be 16 or 32, got " + spec.word("word", ""));
  if (compound && word != 16)
    throw std::invalid_argument("cyclic: compound=True needs word=16, got word=32");
  if (activation != "float" && activation != "int8")
    throw std::invalid_argument("cyclic: activation must be float or int8, got '" + activation +
                                "'");
  if (wanted != std::floor(wanted) || wanted < 0 || wanted > 65536)
    throw std::invalid_argument("cyclic: block must be a whole number from 0 to 65536, got " +
                                spec.word("block", ""));
  const int64_t block = wanted == 0 ? std::max<int64_t>(shape.in, 1) : static_cast<int64_t>(wanted);
  const bool integers = activation == "int8";
  if (integers && block > kCyclicLongestInteger)
    throw std::invalid_argument("cyclic: activation=int8 takes blocks of at most " +
                                std::to_string(kCyclicLongestInteger) + " weights, got " +
                                std::to_string(block));
  Term term;
  Row& row = term.row;
  row.name = "cyclic";
  if (word == 32)
    fill<Cyclic32Word>(row, block, integers);
  else if (compound)
    fill<CyclicCompoundWord>(row, block, integers);
  else
    fill<Cyclic16Word>(row, block, integers);
  // Of fewer outputs the tables of dot products cost long batches more than panels of weights do.
  if (!integers && shape.out < 8192) row.linear_max_m = std::min<int64_t>(row.linear_max_m, 16);
  row.params.push_back({"out_scale", Axis::out, {shape.out}});
  row.out_scale = kCyclicOutScale;
  row.encode_batch = std::max<int64_t>(1, 4096 / block);
  return {term};
}

}  // namespace rs
