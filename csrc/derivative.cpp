#include "derivative.h"

#include <array>

#include "bind.h"
#include "cpu/clones.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace rs {
namespace {

constexpr int64_t kGrain = 1 << 14;

// In 32 bits, which is what lookups of vectors read.
const int32_t* wide_tables() {
  static const auto wide = [] {
    constexpr BitTables tables;
    std::array<int32_t, BitTables::kSize> all{};
    for (int i = 0; i < BitTables::kSize; ++i) all[i] = tables.at[i];
    return all;
  }();
  return wide.data();
}

RS_CLONES void values(BitLayout layout, const int32_t* table, const int32_t* codes, int order,
                      int64_t n, int16_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = bit_value(layout, table, codes[i], order);
}

}  // namespace

const BitLayout* bit_layout(std::string_view name) {
  for (const BitLayout& layout : kBitLayouts)
    if (name == layout.name) return &layout;
  return nullptr;
}

std::string bit_layout_names() {
  std::string names;
  for (const BitLayout& layout : kBitLayouts)
    names += (names.empty() ? "" : ", ") + std::string(layout.name);
  return names;
}

at::Tensor bit_derivative(const at::Tensor& codes, int64_t order, c10::string_view name) {
  const BitLayout& layout = check_bit_derivative(codes, order, name);
  const at::Tensor in = codes.contiguous();
  at::Tensor out = at::empty(codes.sizes(), codes.options().dtype(at::kShort));
  const int32_t* from = in.const_data_ptr<int32_t>();
  int16_t* to = out.mutable_data_ptr<int16_t>();
  const int32_t* table = wide_tables() + layout.first;
  parallel_for(in.numel(), kGrain, [&](int64_t begin, int64_t end) {
    values(layout, table, from + begin, static_cast<int>(order & 3), end - begin, to + begin);
  });
  return out;
}

}  // namespace rs
