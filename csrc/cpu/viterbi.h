// The search behind the trellis codec: which ring of bits has its states' points nearest to a tile.
#pragma once

#include <cstdint>
#include <memory>

#include "../codecs/trellis_search.h"
#include "isa.h"

namespace rs {

// Immutable after construction and free of locks: threads share one. Equal inputs give equal codes
// on every instruction set, however the tiles are cut into calls.
class TrellisSearch {
 public:
  // k = 2 * bits, 3 to 8; radius[64] and angle[16] as in the codec.
  TrellisSearch(int k, const float* radius, const float* angle, Search search, Isa isa);
  ~TrellisSearch();
  TrellisSearch(const TrellisSearch&) = delete;
  TrellisSearch& operator=(const TrellisSearch&) = delete;

  // targets: n tiles of 256 floats, row by row, in the units of radius; what lies far
  // beyond the largest radius is pulled in, NaN counts as 0. codes: n * 16 * k bytes, all written.
  // Scratch (up to 9 MB) stays with the calling thread.
  void run(const float* targets, int64_t n, uint8_t* codes) const;

  // Tiles that run() takes through the trellis together; callers hand it multiples.
  static constexpr int kBatch = 4;

 private:
  struct Impl;
  std::unique_ptr<const Impl> impl_;
};

}  // namespace rs
