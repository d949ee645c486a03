// The search for the base of mode=xor.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "hierarchical.h"

namespace rs {

// Every base stands for four values, and its eight weights take the nearest each. T has no more
// than sixteen turns, so diff = 0 covers all 65536 bases by 16384. Few of those are ever the best:
// the ones that were for some of a fixed sample of Gaussian groups are kept, in a tree over their
// four values in rising order, cut into leaves. A search looks at the mean of every leaf and at all
// bases of the leaves whose means are nearest.
//
// So a search finds a good base, not always the best of all 65536: on Gaussian weights the squared
// error is about 1 percent above that (0.1 for levels in equal steps).
class XorSearch {
 public:
  explicit XorSearch(const float* levels);

  // The base for eight weights of importance h.
  uint32_t run(const float* w, const float* h) const;

  // For these levels; the last one is kept, as error feedback asks for the same thousands of times.
  static std::shared_ptr<const XorSearch> with(const float* levels);

 private:
  class Tree;
  std::shared_ptr<const Tree> tree_;
};

}  // namespace rs
