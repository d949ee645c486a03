// Tables of dot products of rows of x with the basis of `cyclic`, rounded to 16 bits.
#pragma once

#include <memory>
#include <vector>

#include "../codec.h"
#include "cyclic_product.h"
#include "integers.h"

namespace rs {

// The dot products of up to kCyclicMostLanes rows of x, in either order of a table.
class CyclicDots {
 public:
  CyclicDots(const Layer& layer, int64_t vectors, bool integers, int most_lanes);

  // Of rows [0, batch) of x (batch, in).
  void fill(const float* x, int batch, int lanes, bool apart);

  const int16_t* table() const { return table_.get(); }
  // y ~ sum * unit, not counting the unit of the levels.
  double unit(int b) const { return unit_[b]; }
  // Rows whose dot products do not fit 16 bits, and these, [column][vector].
  bool is_wide(int b) const { return wide_ >> b & 1; }
  std::vector<int32_t> wide_table(int b) const;

 private:
  int64_t block_, columns_, vectors_;
  bool integers_;
  std::vector<float> basis_, turned_;  // (vectors, block), (block, vectors)
  double basis_unit_ = 1, longest_ = 0;
  std::unique_ptr<int16_t[]> table_;
  std::vector<float> bytes_;
  const float* rows_ = nullptr;  // (batch, in): x, or its integers
  float inverse_[kCyclicMostLanes] = {};
  double unit_[kCyclicMostLanes] = {};
  uint32_t wide_ = 0;
};

}  // namespace rs
