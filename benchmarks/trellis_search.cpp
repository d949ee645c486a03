// Error and speed of the trellis search on unit Gaussian tiles, one thread.
//
//   g++ -O3 -std=c++20 -ffp-contract=off -Icsrc benchmarks/trellis_search.cpp csrc/cpu/viterbi*.cpp
//   ./a.out [tiles = 1024] [repeats = 3] [avx512|avx2|generic = all]
//
// A line per rate, search and instruction set: normalised squared error after the best single gain,
// from the codec's own decode, and millions of weights per second of processor time, best of the
// repeats. Exits with 1 when two instruction sets give different codes.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <random>
#include <vector>

#include "codecs/trellis.h"
#include "cpu/viterbi.h"

namespace {

using namespace rs;

// The codec's initial table at a rate.
struct Table {
  float radius[kTrellisRadii], angle[kTrellisAngles];

  explicit Table(int k) {
    for (int i = 0; i < kTrellisRadii; ++i)
      radius[i] = static_cast<float>(std::sqrt(-2 * std::log(1 - (i + 0.5) / kTrellisRadii)));
    for (int j = 0; j < kTrellisAngles; ++j) angle[j] = static_cast<float>((j + 0.5) * M_PI / 32);
    const PolarTable table(radius, angle);
    double square = 0;
    for (uint32_t s = 0; s < 65536; ++s) {
      float w[2];
      table.point(s, w);
      square += w[0] * w[0] + w[1] * w[1];
    }
    const double scale = (k < 7 ? 1.0 : 1.06) / std::sqrt(square / 131072);
    for (float& r : radius) r = static_cast<float>(r * scale);
  }
};

template <int K>
double error(const std::vector<float>& x, const std::vector<uint8_t>& codes, const Table& table) {
  Layer layer{};
  layer.params = {table.radius, table.angle};
  const typename Trellis<K>::Tables tables(layer);
  double xq = 0, qq = 0, xx = 0;
  for (size_t i = 0; i < x.size(); i += 2) {
    float w[2];
    Trellis<K>::decode(&codes[i / 256 * 16 * K], 0, 0, static_cast<int>(i % 256 / 2), tables, w);
    for (int c = 0; c < 2; ++c) {
      xq += x[i + c] * w[c];
      qq += w[c] * w[c];
      xx += x[i + c] * x[i + c];
    }
  }
  return 1 - xq * xq / (qq * xx);
}

constexpr decltype(&error<3>) kError[] = {error<3>, error<4>, error<5>,
                                          error<6>, error<7>, error<8>};

}  // namespace

int main(int argc, char** argv) {
  const int64_t n = argc > 1 ? std::atoi(argv[1]) : 1024;
  const int repeats = argc > 2 ? std::atoi(argv[2]) : 3;
  std::mt19937_64 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> x(n * 256);
  for (float& v : x) v = normal(random);

  bool equal = true;
  std::printf("bits  search  isa       error     Mw/s\n");
  for (int k = 3; k <= 8; ++k)
    for (Search search : {Search::exact, Search::fast}) {
      std::vector<uint8_t> first;
      for (Isa isa : {Isa::avx512, Isa::avx2, Isa::generic}) {
        const char* name = isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "generic";
        if (argc > 3 && std::strcmp(argv[3], name)) continue;
        if (isa == Isa::avx512 && !__builtin_cpu_supports("avx512vbmi2")) continue;
        if (isa == Isa::avx2 && !__builtin_cpu_supports("avx2")) continue;
        const Table table(k);
        const TrellisSearch trellis(k, table.radius, table.angle, search, isa);
        std::vector<uint8_t> codes(n * 16 * k);
        double best = 1e30;
        for (int r = 0; r < repeats; ++r) {
          const std::clock_t start = std::clock();
          trellis.run(x.data(), n, codes.data());
          best = std::min(best, static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC);
        }
        if (first.empty()) first = codes;
        const bool same = codes == first;
        equal = equal && same;
        std::printf("%.1f   %-6s  %-8s  %.5f  %6.3f%s\n", k / 2.0,
                    search == Search::exact ? "exact" : "fast", name,
                    kError[k - 3](x, codes, table), n * 256 / best / 1e6,
                    same ? "" : "  codes differ");
        std::fflush(stdout);
      }
    }
  return equal ? 0 : 1;
}
