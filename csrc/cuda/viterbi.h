// The trellis codec's search on the device: the codes of cpu/viterbi.h bit for bit, for angles
// within the series of polar_direction.
#pragma once

#include "../codecs/trellis_search.h"
#include "types.h"

namespace rs::cuda {

// Tiles of 16 x 16 of w (out, in) float32, row by row of tiles, in the units of radius.
struct TrellisTargets {
  const float* w;
  int64_t out, in;
  const float *radius, *angle;

  int64_t tiles() const { return out / 16 * (in / 16); }
};

// Bytes of scratch: 400 KB, and for each processor in use at most 1 MB.
int64_t viterbi_scratch(const TrellisTargets& targets, int k);

// codes: 16 * k bytes a tile, all written. k = 2 * bits, 3 to 8.
cudaError_t viterbi(const TrellisTargets& targets, int k, Search search, uint8_t* codes,
                    void* scratch, cudaStream_t stream);

}  // namespace rs::cuda
