// Every slot of every codec on exact-size heap buffers, for AddressSanitizer and
// UndefinedBehaviorSanitizer: any bytes as codes, any floats as params, odd shapes, every instruction
// set this processor has. Reads codec specs from standard input, one a line.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <memory>
#include <random>
#include <string>

#include "../../csrc/codec.h"
#include "../../csrc/cpu/frame.h"
#include "../../csrc/cpu/half.h"
#include "../../csrc/cpu/isa.h"
#include "../../csrc/cpu/parallel.h"

namespace rs {

// Serial, in uneven ranges: a result that depended on the cut would differ from the library's.
void parallel_for_raw(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  const int64_t units = (n + grain - 1) / grain;
  const int64_t cuts[] = {0, units / 5, units / 2, units};
  for (int i = 0; i < 3; ++i)
    if (cuts[i] < cuts[i + 1]) body(context, cuts[i] * grain, std::min(n, cuts[i + 1] * grain));
}

}  // namespace rs

namespace {

using namespace rs;

std::mt19937 rng(1);

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "sanitize: %s\n", what.c_str());
  std::abort();
}

// A heap buffer of exactly `size` values, one past an aligned address when `shift` is 1.
template <class T>
struct Exact {
  std::unique_ptr<T[]> memory;
  int64_t size;
  int shift;
  explicit Exact(int64_t size, int shift = 0)
      : memory(new T[static_cast<size_t>(size + shift)]()), size(size), shift(shift) {}
  T* data() { return memory.get() + shift; }
  T* begin() { return data(); }
  T* end() { return data() + size; }
};

enum class Floats { sane, wild };

float any_float(Floats kind) {
  if (kind == Floats::wild) {
    const uint32_t bits = rng();
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  return rng() % 10 ? std::uniform_real_distribution<float>(-2, 2)(rng) : 0.0f;
}

template <class Buffer>
void fill(Buffer& buffer, Floats kind) {
  for (float& value : buffer) value = any_float(kind);
}

int64_t product(const std::vector<int64_t>& sizes) {
  int64_t n = 1;
  for (int64_t size : sizes) n *= size;
  return n;
}

// One term of a codec with data of its own.
struct Case {
  const Row& row;
  Layer layer;
  Exact<uint8_t> codes;
  std::vector<Exact<float>> params;

  Case(const Term& term, Shape shape, Floats kind)
      : row(term.row),
        layer{&term.spec, round_up(shape.out, row.tile.rows), round_up(shape.in, row.tile.cols), row.tile, nullptr, {}},
        codes(layer.tile_rows() * layer.tile_cols() * row.tile.bytes, 1) {
    for (uint8_t& byte : codes) byte = static_cast<uint8_t>(rng());
    layer.codes = codes.data();
    for (const ParamSpec& p : row.params) {
      const int64_t n = product(p.sizes);
      params.emplace_back(p.codes ? (n + 3) / 4 : n, 1);
      fill(params.back(), kind);
    }
    for (auto& p : params) layer.params.push_back(p.data());
  }
};

void check(Case& c) {
  if (!c.row.check) return;
  for (int64_t t = 0; t < c.layer.tile_rows() * c.layer.tile_cols(); ++t) {
    try {
      c.row.check(c.layer, t);
    } catch (const std::invalid_argument&) {
    }
  }
}

// All rows at once and one row of tiles at a time must agree with `want`, bit for bit.
void decode(Case& c, const std::string& name, Exact<float>* want) {
  const int64_t rows = c.row.tile.rows;
  Exact<float> all(c.layer.out * c.layer.in, 1), part(rows * c.layer.in);
  c.row.decode(c.layer, 0, c.layer.out, all.data());
  for (int64_t r = 0; r < c.layer.out; r += rows) {
    c.row.decode(c.layer, r, r + rows, part.data());
    if (std::memcmp(part.data(), all.data() + r * c.layer.in, part.size * sizeof(float)))
      fail(name + ": a row of tiles decodes otherwise on its own");
  }
  if (want && std::memcmp(want->data(), all.data(), all.size * sizeof(float))) fail(name + ": decode differs");
  if (c.row.decode_bf16) {
    Exact<uint16_t> narrow(all.size, 1);
    c.row.decode_bf16(c.layer, 0, c.layer.out, narrow.data());
    for (int64_t i = 0; want && i < all.size; ++i)
      if (narrow.data()[i] != to_bf16(all.data()[i])) fail(name + ": bfloat16 decode is not the rounded decode");
  }
}

void adjoint(Case& c, Floats kind) {
  Exact<float> dw(c.layer.out * c.layer.in, 1);
  fill(dw, kind);
  std::vector<Exact<float>> grads;
  for (auto& p : c.params) grads.emplace_back(p.size);
  for (size_t without = 0; without <= grads.size(); ++without) {
    std::vector<float*> pointers;
    for (size_t i = 0; i < grads.size(); ++i) {
      const bool none = i == without || c.row.params[i].codes;
      pointers.push_back(none ? nullptr : grads[i].data());
    }
    c.row.adjoint(c.layer, 0, c.layer.out, dw.data(), pointers.data());
  }
}

void linear(Case& c, Floats kind) {
  if (!c.row.linear) return;
  for (int64_t m : {1, 2, 3, 5, 7, 8, 9, 17, 33}) {
    if (m > c.row.linear_max_m) continue;
    Exact<float> x(m * c.layer.in, 1), y(m * c.layer.out, 1);
    fill(x, kind);
    c.row.linear(c.layer, x.data(), m, y.data());
  }
}

void linear_grad_input(Case& c, Floats kind) {
  if (!c.row.linear_grad_input) return;
  for (int64_t m : {1, 15, 17}) {
    Exact<float> dy(m * c.layer.out, 1), dx(m * c.layer.in, 1);
    fill(dy, kind);
    c.row.linear_grad_input(c.layer, dy.data(), m, dx.data());
  }
}

// The first tiles and the last: enough for every edge, and quick for a search.
void encode(Case& c) {
  const int64_t tiles = c.layer.tile_rows() * c.layer.tile_cols();
  for (float scale : {1.0f, 0.0f, 1e30f, 1e-30f}) {
    Exact<float> w(c.layer.out * c.layer.in, 1), importance(c.layer.in, 1);
    fill(w, Floats::sane);
    for (float& value : w) value *= scale;
    for (float& value : importance) value = 0.1f + static_cast<float>(rng() % 100);
    Exact<uint8_t> codes(c.codes.size);
    std::vector<float*> outputs;
    for (auto& p : c.params) outputs.push_back(p.data());
    EncodeOptions options;
    options.importance = scale == 1.0f ? importance.data() : nullptr;
    const int64_t some = c.row.tile.rows > 1 ? std::min<int64_t>(tiles, 2) : tiles;
    c.row.encode(c.layer, w.data(), options, 0, some, codes.data(), outputs.data());
    if (some < tiles && scale == 1.0f)
      c.row.encode(c.layer, w.data(), options, tiles - 1, tiles, codes.data(), outputs.data());
    // What an encoder writes is valid, unless it refers to tables, which are random bytes here.
    const bool tables = std::any_of(c.row.params.begin(), c.row.params.end(), [](const ParamSpec& p) { return p.codes; });
    if (!c.row.check || tables) continue;
    Layer written = c.layer;
    written.codes = codes.data();
    for (int64_t t = 0; t < some; ++t) c.row.check(written, t);
  }
}

constexpr Shape kShapes[] = {{1, 1}, {1, 17}, {17, 1}, {16, 16}, {33, 50}, {3, 1000}, {130, 70}, {64, 272}};
constexpr Isa kIsas[] = {Isa::generic, Isa::avx2, Isa::avx512};

void walk(const std::string& text) {
  for (const Shape shape : kShapes) {
    for (const Floats kind : {Floats::sane, Floats::wild}) {
      const auto seed = static_cast<uint32_t>(shape.out * 7919 + shape.in);
      std::vector<std::unique_ptr<Exact<float>>> wanted;  // of the generic decode, per term
      for (const Isa isa : kIsas) {
        if (isa > best_isa()) continue;
        set_isa(isa);
        const std::string name = text + " on " + isa_name(isa);
        const std::vector<Term> terms = resolve(Spec::parse(text), shape);
        for (size_t t = 0; t < terms.size(); ++t) {
          rng.seed(seed + static_cast<uint32_t>(t));  // the same data on every instruction set
          Case c(terms[t], shape, kind);
          if (isa == Isa::generic) {
            wanted.push_back(std::make_unique<Exact<float>>(c.layer.out * c.layer.in));
            c.row.decode(c.layer, 0, c.layer.out, wanted.back()->data());
          }
          check(c);
          decode(c, name, kind == Floats::sane ? wanted[t].get() : nullptr);
          adjoint(c, kind);
          linear(c, kind);
          linear_grad_input(c, kind);
          const bool small = shape.out * shape.in <= 33 * 50 && shape.out > 16;
          if (kind == Floats::sane && (c.row.tile.rows == 1 || (small && terms.size() == 1))) encode(c);
        }
      }
    }
  }
}

void hadamard() {
  for (int64_t block = 1; block <= 128; block *= 2) {
    for (int64_t rows : {1, 3}) {
      Exact<float> across(rows * 2 * block, 1), down(2 * block * rows, 1);
      hadamard_rows(across.data(), 2 * block, across.data(), 2 * block, rows, 2 * block, block);
      hadamard_columns(down.data(), 2 * block, rows, rows, block);
    }
  }
}

void half() {
  for (int i = 0; i < 100000; ++i) {
    const float x = any_float(Floats::wild);
    to_bf16(x);
    round_to_half(x);
  }
}

// A text is a codec or std::invalid_argument, whatever it holds, for any shape.
void fuzz(const std::vector<std::string>& texts) {
  const std::string letters = "()=,. -+0123456789eEnaifTruFlsbg_\n\xff";
  const int64_t sizes[] = {0, 1, 17, 65535, 65536, int64_t{1} << 39};
  int known = 0;
  for (int i = 0; i < 200000; ++i) {
    std::string text = texts[rng() % texts.size()];
    for (uint32_t edits = rng() % 4; edits; --edits) {
      const size_t at = rng() % (text.size() + 1);
      if (rng() % 2 && at < text.size()) text.erase(at, 1 + rng() % 5);
      else text.insert(at, 1, rng() % 50 ? letters[rng() % letters.size()] : '\0');
    }
    if (rng() % 20 == 0) text = text.substr(0, rng() % (text.size() + 1));
    if (rng() % 100 == 0) text.insert(text.size() / 2, std::string(rng() % 3000, '('));
    try {
      known += !resolve(Spec::parse(text), {sizes[rng() % 6], sizes[rng() % 6]}).empty();
    } catch (const std::invalid_argument&) {
    }
  }
  std::printf("%d of 200000 texts were codecs\n", known);
}

}  // namespace

int main() {
  std::vector<std::string> texts;
  for (std::string line; std::getline(std::cin, line);) texts.push_back(line);
  if (texts.empty()) fail("give codec specs on standard input");
  hadamard();
  half();
  for (const std::string& text : texts) walk(text);
  fuzz(texts);
  std::printf("%zu codecs clean up to %s\n", texts.size(), isa_name(best_isa()));
}
