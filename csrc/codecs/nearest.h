// The nearest of a sorted list of numbers, found from a grid of cells instead of by bisection.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace rs {

class Nearest {
 public:
  // `values` rise; about four cells for each keep the walk from a cell's first candidate short.
  Nearest(std::vector<float> values, int cells)
      : values_(std::move(values)),
        low_(values_.front()),
        high_(values_.back()),
        scale_(static_cast<float>(cells) / (high_ - low_)) {
    for (size_t i = 1; i < values_.size(); ++i)
      middle_.push_back(0.5f * (values_[i - 1] + values_[i]));
    middle_.push_back(high_ + 1);  // beyond any argument
    for (int cell = 0; cell <= cells; ++cell) {
      // A hair early: which cell a number is in is found with rounding.
      const float edge = low_ + (static_cast<float>(cell) - 0.01f) / scale_;
      begin_.push_back(static_cast<uint16_t>(
          std::lower_bound(middle_.begin(), middle_.end(), edge) - middle_.begin()));
    }
  }

  float operator[](size_t at) const { return values_[at]; }
  // x may be any number but NaN.
  size_t find(float x) const {
    const float held = std::min(std::max(x, low_), high_);
    size_t at = begin_[static_cast<size_t>((held - low_) * scale_)];
    while (middle_[at] < held) ++at;
    return at;
  }

 private:
  std::vector<float> values_, middle_;
  std::vector<uint16_t> begin_;
  float low_, high_, scale_;
};

}  // namespace rs
