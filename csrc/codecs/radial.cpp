#include "radial.h"

#include <algorithm>
#include <bit>
#include <list>
#include <mutex>

#include "radial_functions.h"

namespace rs {
namespace {

RadialTable tabulate(int word, float r_max) {
  RadialTable table;
  table.value.resize(static_cast<size_t>(radial_entries(word)));
  table.slope.resize(table.value.size());
  for (int n = 0; n < radial_radii(word); ++n)
    radial::tabulate(word, n, r_max, table.value.data(), table.slope.data());
  return table;
}

struct Cached {
  int word = 0;
  uint32_t bits = 0;  // of r_max
  std::shared_ptr<const RadialTable> table;
};

constexpr size_t kKept[2] = {128, 32};  // tables of word 22 (16 MB in all) and of word 32

}  // namespace

std::shared_ptr<const RadialTable> radial_table(int word, float r_max) {
  const float held = held_r_max(r_max);
  const auto bits = std::bit_cast<uint32_t>(held);
  thread_local Cached last;
  if (last.word == word && last.bits == bits) return last.table;
  static std::mutex mutex;
  static std::list<Cached> kept[2];  // most recently used first
  const std::lock_guard lock(mutex);
  std::list<Cached>& tables = kept[word == 32];
  auto found =
      std::find_if(tables.begin(), tables.end(), [&](const Cached& c) { return c.bits == bits; });
  if (found == tables.end()) {
    if (tables.size() == kKept[word == 32]) tables.pop_back();
    tables.push_front({word, bits, std::make_shared<const RadialTable>(tabulate(word, held))});
  } else {
    tables.splice(tables.begin(), tables, found);
  }
  return (last = tables.front()).table;
}

}  // namespace rs
