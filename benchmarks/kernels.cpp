// Times and checks the fast CPU slots without torch.
//
//   g++ -O3 -std=c++20 -ffp-contract=off -pthread benchmarks/kernels.cpp
//   csrc/cpu/{trellis_,uniform_}*.cpp -o kernels
//   ./kernels [substring of a format's name [out in [warm]]]
//
// Weights rotate over copies beyond three times a 32 MB cache, so they come from memory. `plain`
// codes lie in ordinary pages, `huge` in huge ones. Checks: the product against float64 over
// decode_loop's weights, decode bit by bit, on odd shapes and unaligned codes.
#include <sys/mman.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../csrc/codecs/trellis.h"
#include "../csrc/codecs/uniform.h"
#include "../csrc/cpu/fast.h"
#include "../csrc/cpu/loops.h"
#include "standalone.h"

using namespace rs;

namespace {

constexpr size_t kCold = 3 * (size_t{32} << 20);
bool warm = false;  // one copy: what a kernel does when memory is no limit

struct Random {
  uint64_t state;
  uint64_t next() {
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  float normal() {
    return static_cast<float>(std::sqrt(-2 * std::log(1 - uniform())) *
                              std::cos(6.283185307 * uniform()));
  }
};

class Pages {
 public:
  Pages(size_t bytes, bool huge) : bytes_((bytes + (size_t{2} << 20)) & ~((size_t{2} << 20) - 1)) {
    void* p = mmap(nullptr, bytes_ + (size_t{2} << 20), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    base_ = p;
    data_ = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(p) + (2 << 20) - 1) &
                                       ~uintptr_t{(2 << 20) - 1});
    madvise(data_, bytes_, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  }
  ~Pages() { munmap(base_, bytes_ + (size_t{2} << 20)); }
  Pages(const Pages&) = delete;
  uint8_t* data() const { return data_; }

 private:
  size_t bytes_;
  void* base_;
  uint8_t* data_;
};

// A copy that ends where its mapping does: reading or writing past it stops the program.
class Guarded {
 public:
  Guarded(const void* from, size_t bytes) : bytes_((bytes + 8191) & ~size_t{4095}) {
    base_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    uint8_t* end = static_cast<uint8_t*>(base_) + bytes_ - 4096;
    mprotect(end, 4096, PROT_NONE);
    data_ = end - bytes;
    std::memcpy(data_, from, bytes);
  }
  ~Guarded() { munmap(base_, bytes_); }
  Guarded(const Guarded&) = delete;
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  size_t bytes_;
  void* base_;
  uint8_t* data_;
};

struct Format {
  std::string name;
  Tile tile;
  double bits;
  bool tables;  // shared tables; otherwise one scale, and perhaps one zero, per tile
  bool zeros;
  void (*decode)(const Layer&, int64_t, int64_t, float*);
  std::function<void(Row&, Isa)> fast;
};

template <int K>
Format trellis() {
  return {"trellis" + std::to_string(K / 2) + (K % 2 ? ".5" : ""),
          {16, 16, 16 * K},
          K / 2.0,
          true,
          false,
          decode_loop<Trellis<K>>,
          [](Row& row, Isa isa) { trellis_fast_slots(row, K, isa); }};
}

template <int Bits, bool Symmetric>
Format uniform(int64_t group) {
  return {"uniform" + std::to_string(Bits) + (Symmetric ? "s" : "z") + std::to_string(group),
          {1, group, (group * Bits + 7) / 8},
          Bits + (Symmetric ? 32.0 : 64.0) / static_cast<double>(group),
          false,
          !Symmetric,
          decode_loop<Uniform<Bits, Symmetric>>,
          [group](Row& row, Isa isa) { uniform_fast_slots(row, Bits, Symmetric, group, isa); }};
}

// `copies` matrices with params of their own.
struct Weights {
  Pages pages;
  std::vector<Layer> layers;

  Weights(const Format& f, int64_t out, int64_t in, size_t copies, bool huge, size_t shift = 0)
      : pages(copies * (size(f, out, in) + shift + 64), huge) {
    Random random{1};
    for (size_t c = 0; c < copies; ++c) {
      uint8_t* at = pages.data() + c * (size(f, out, in) + shift + 63) / 64 * 64;
      const int64_t tiles = out / f.tile.rows * (in / f.tile.cols);
      const auto floats = [&](int64_t n, auto&& value) {
        float* p = reinterpret_cast<float*>(at);
        for (int64_t i = 0; i < n; ++i) p[i] = static_cast<float>(value(i));
        at += n * 4;
        return p;
      };
      Layer layer{nullptr, out, in, f.tile, nullptr, {}};
      if (f.tables) {
        layer.params = {
            floats(64, [](double i) { return std::sqrt(-2 * std::log(1 - (i + .5) / 64)); }),
            floats(16, [](double i) { return (i + .5) * 3.14159265358979 / 32; })};
      } else {
        layer.params = {floats(tiles, [&](double) { return .01 + .02 * random.uniform(); })};
        const double middle = std::exp2(std::floor(f.bits) - 1);
        if (f.zeros)
          layer.params.push_back(floats(tiles, [&](double) { return middle + random.uniform(); }));
      }
      at += shift;
      layer.codes = at;
      for (int64_t i = 0; i + 8 <= tiles * f.tile.bytes; i += 8) {
        const uint64_t r = random.next();
        std::memcpy(at + i, &r, 8);
      }
      layers.push_back(layer);
    }
  }
  static size_t size(const Format& f, int64_t out, int64_t in) {
    const int64_t tiles = out / f.tile.rows * (in / f.tile.cols);
    return static_cast<size_t>(tiles * f.tile.bytes + (f.tables ? 320 : tiles * (f.zeros ? 8 : 4)) +
                               128);
  }
};

std::vector<float> normals(int64_t n, uint64_t seed) {
  Random random{seed};
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = random.normal();
  return x;
}

// Relative error of y against float64 on the rows of T decoded from row0 on.
double error(const Format& f, const Layer& layer, const float* x, int64_t m, const float* y,
             int64_t row0, int64_t row1) {
  std::vector<float> w(static_cast<size_t>((row1 - row0) * layer.in));
  f.decode(layer, row0, row1, w.data());
  double wrong = 0, norm = 0;
  for (int64_t b = 0; b < m; ++b)
    for (int64_t r = row0; r < row1; ++r) {
      double sum = 0;
      for (int64_t c = 0; c < layer.in; ++c)
        sum += static_cast<double>(w[static_cast<size_t>((r - row0) * layer.in + c)]) *
               x[b * layer.in + c];
      const double d = sum - y[b * layer.out + r];
      wrong += d * d, norm += sum * sum;
    }
  return std::sqrt(wrong / norm);
}

uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

int failures = 0;
void expect(bool good, const std::string& what) {
  if (good) return;
  ++failures;
  std::printf("FAILED %s\n", what.c_str());
}

// Activations that integers could spoil, and results that could depend on the threads.
void check_extremes(const Format& f, const Row& row, const std::string& where) {
  const int64_t out = 40 * f.tile.rows, in = f.tile.cols * 20, m = 3;
  const Weights weights(f, 160 * out, in, 1, false);
  Layer layer = weights.layers[0];
  const auto product = [&](const std::vector<float>& x) {
    std::vector<float> y(static_cast<size_t>(m * layer.out), 7);
    row.linear(layer, x.data(), m, y.data());
    return y;
  };
  const auto x = normals(m * in, 5);
  Pool::get().resize(1);
  const auto one = product(x);
  Pool::get().resize(2);
  expect(one == product(x), where + " linear depends on the threads");
  layer.out = out;
  for (const float scale : {1e-20f, 1e30f}) {
    auto far = x;
    for (float& v : far) v *= scale;
    far[5] *= 100;
    expect(error(f, layer, far.data(), m, product(far).data(), 0, out) < 3e-3,
           where + " linear of extreme x");
  }
  for (const float bad : {NAN, INFINITY}) {
    auto spoilt = x;
    spoilt[static_cast<size_t>(in + 3)] = bad;
    const auto y = product(spoilt);
    bool right = true;
    for (size_t i = 0; i < y.size(); ++i)
      right &= std::isfinite(y[i]) != (i / static_cast<size_t>(out) == 1);
    expect(right, where + " linear keeps NaN in its row");
  }
  const auto zero = product(std::vector<float>(static_cast<size_t>(m * in)));
  expect(std::count(zero.begin(), zero.end(), 0.0f) == m * out, where + " linear of zero");
}

void check(const Format& f, const Row& row, Isa isa) {
  const std::string where = f.name + " " + isa_name(isa);
  if (row.linear) check_extremes(f, row, where);
  for (const int64_t tiles_out : {1, 3, 17})
    for (const int64_t tiles_in : {1, 2, 5, 12, 33})
      for (const size_t shift : {0, 1, 7}) {
        const int64_t out = tiles_out * f.tile.rows, in = tiles_in * f.tile.cols;
        const Weights weights(f, out, in, 1, false, shift);
        Layer layer = weights.layers[0];
        const auto size = static_cast<size_t>(out * in);
        const auto tiles = static_cast<size_t>(tiles_out * tiles_in);
        const Guarded codes(layer.codes, tiles * static_cast<size_t>(f.tile.bytes));
        const Guarded first(layer.params[0], (f.tables ? 64 : tiles) * 4);
        const Guarded last(layer.params.back(), (f.tables ? 16 : tiles) * 4);
        if (shift == 0) {  // otherwise what follows the codes is readable, and they are not aligned
          layer.codes = codes.as<uint8_t>();
          layer.params.front() = first.as<float>();
          layer.params.back() = last.as<float>();
        }
        std::vector<float> w(size, NAN);
        const Guarded fast_copy(w.data(), size * 4), half_copy(w.data(), size * 2);
        float* fast = fast_copy.as<float>();
        uint16_t* half = half_copy.as<uint16_t>();
        f.decode(layer, 0, out, w.data());
        const int64_t middle = tiles_out / 2 * f.tile.rows;
        if (row.decode) {
          row.decode(layer, 0, middle, fast);
          row.decode(layer, middle, out, fast + middle * in);
          expect(!std::memcmp(w.data(), fast, size * 4), where + " decode");
        }
        if (row.decode_bf16) {
          row.decode_bf16(layer, 0, middle, half);
          row.decode_bf16(layer, middle, out, half + middle * in);
          size_t wrong = 0;
          for (size_t i = 0; i < size; ++i) wrong += half[i] != to_bf16(w[i]);
          expect(!wrong, where + " decode_bf16");
        }
        if (row.linear)
          for (const int64_t m : {1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 48, 64, 65, 130}) {
            if (m > row.linear_max_m) break;
            const Guarded x(normals(m * in, 5).data(), static_cast<size_t>(m * in) * 4);
            const std::vector<float> unset(static_cast<size_t>(m * out), NAN);
            const Guarded y(unset.data(), unset.size() * 4);
            row.linear(layer, x.as<float>(), m, y.as<float>());
            const double e = error(f, layer, x.as<float>(), m, y.as<float>(), 0, out);
            expect(e < 3e-3, where + " linear " + std::to_string(in) + " m " + std::to_string(m) +
                                 ": " + std::to_string(e));
          }
      }
}

// Milliseconds: least and median of `repeats`, and the least this thread had the processor for,
// which other programs disturb less.
struct Time {
  double least, median, busy;
};
double busy_ms() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) * 1e3 + static_cast<double>(t.tv_nsec) / 1e6;
}
template <class F>
Time measure(int repeats, F&& f) {
  std::vector<double> ms;
  double busy = INFINITY;
  for (int r = 0; r < repeats; ++r) {
    const auto start = std::chrono::steady_clock::now();
    const double busy_before = busy_ms();
    f(static_cast<size_t>(r));
    busy = std::min(busy, busy_ms() - busy_before);
    ms.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
                     .count());
  }
  std::sort(ms.begin(), ms.end());
  return {ms.front(), ms[ms.size() / 2], busy};
}

void print(const std::string& what, Time t, double weights, double bytes,
           const std::string& more = "") {
  std::printf("%-44s %7.3f ms least %7.3f median %7.3f busy %7.2f Gw/s %6.1f GB/s %s\n",
              what.c_str(), t.least, t.median, t.busy, weights / t.least / 1e6,
              bytes / t.least / 1e6, more.c_str());
  std::fflush(stdout);
}

void time_format(const Format& f, Isa isa, int64_t out, int64_t in) {
  in = round_up(in, f.tile.cols);
  Row row;
  row.tile = f.tile;
  f.fast(row, isa);
  check(f, row, isa);
  if (!row.linear && !row.decode && !row.decode_bf16) return;
  const double weights = static_cast<double>(out * in), bytes = weights * f.bits / 8;
  const size_t copies = warm ? 1 : kCold / static_cast<size_t>(bytes) + 2;
  for (const bool huge : {false, true}) {
    const Weights data(f, out, in, copies, huge);
    const std::string pages = huge ? " huge " : " plain ";
    if (row.linear)
      for (const int threads : {1, 2})
        for (const int64_t m : {1, 2, 4, 8, 16, 32, 128}) {
          if (m > row.linear_max_m) break;
          Pool::get().resize(threads);
          const auto x = normals(m * in, 5);
          std::vector<float> y(static_cast<size_t>(m * out));
          const auto run = [&](size_t r) {
            row.linear(data.layers[r % copies], x.data(), m, y.data());
          };
          const Time t = measure(40, run);
          run(0);
          char note[32];
          std::snprintf(note, sizeof note, "error %.1e",
                        error(f, data.layers[0], x.data(), m, y.data(), out - 64, out));
          print(f.name + " " + isa_name(isa) + pages + std::to_string(threads) +
                    "t m=" + std::to_string(m),
                t, weights, bytes, note);
        }
    if (!huge) continue;
    constexpr int64_t kPanel = 64;
    const Pages panel(static_cast<size_t>(kPanel * in) * sizeof(float), true);
    float* w = reinterpret_cast<float*>(panel.data());
    const auto panels = [&](auto decode, auto* to) {
      return measure(10, [&](size_t r) {
        for (int64_t i = 0; i < out / 4; i += kPanel)
          decode(data.layers[r % copies], i, i + kPanel, to);
      });
    };
    const std::string who = f.name + " " + isa_name(isa);
    if (row.decode) print(who + " decode 1t", panels(row.decode, w), weights / 4, bytes / 4);
    if (row.decode_bf16)
      print(who + " decode_bf16 1t", panels(row.decode_bf16, reinterpret_cast<uint16_t*>(w)),
            weights / 4, bytes / 4);
  }
}

// Plain float32 product, for scale.
__attribute__((target("avx2,fma"), optimize("fast-math"))) void gemv(const float* w, int64_t in,
                                                                     const float* x, float* y,
                                                                     int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    float sum[32] = {};
    for (int64_t c = 0; c < in; c += 32)
      for (int i = 0; i < 32; ++i) sum[i] += w[r * in + c + i] * x[c + i];
    float total = 0;
    for (float s : sum) total += s;
    y[r] = total;
  }
}

void time_float(int64_t out, int64_t in) {
  const Pages pages(static_cast<size_t>(out * in * 4), true);
  float* w = reinterpret_cast<float*>(pages.data());
  for (int64_t i = 0; i < out * in; ++i) w[i] = 1;
  const auto x = normals(in, 5);
  std::vector<float> y(static_cast<size_t>(out));
  for (const int threads : {1, 2}) {
    Pool::get().resize(threads);
    const Time t = measure(10, [&](size_t) {
      parallel_for(out, 1, [&](int64_t b, int64_t e) { gemv(w, in, x.data(), y.data(), b, e); });
    });
    print("float32 huge " + std::to_string(threads) + "t m=1", t, static_cast<double>(out * in),
          static_cast<double>(out * in * 4));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string wanted = argc > 1 ? argv[1] : "";
  const int64_t out = argc > 3 ? std::atoll(argv[2]) : 14336,
                in = argc > 3 ? std::atoll(argv[3]) : 4096;
  warm = argc > 4;
  const std::vector<Format> formats = {
      trellis<4>(),           trellis<3>(),          trellis<5>(),           trellis<6>(),
      trellis<7>(),           trellis<8>(),          uniform<4, true>(64),   uniform<4, false>(64),
      uniform<8, true>(64),   uniform<8, false>(64), uniform<4, true>(128),  uniform<2, true>(64),
      uniform<3, false>(64),  uniform<4, true>(32),  uniform<8, true>(32),   uniform<4, false>(96),
      uniform<8, false>(160), uniform<5, true>(128), uniform<6, false>(32),  uniform<7, true>(64),
      uniform<4, true>(33),   uniform<4, true>(512), uniform<8, false>(1056)};
  if (wanted.empty()) time_float(out, in);
  for (const Format& f : formats)
    if (f.name.find(wanted) != std::string::npos)
      for (const Isa isa : {Isa::avx512, Isa::avx2})
        if (isa <= best_isa()) time_format(f, isa, out, in);
  std::printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
  return failures != 0;
}
