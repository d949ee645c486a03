// The encoder of `cyclic`: the code of least weighted squared error, over all vectors and factors.
#pragma once

#include "cyclic.h"

namespace rs {

template <class Word>
void cyclic_encode(const Layer& layer, const float* w, const EncodeOptions& options, int64_t tile0,
                   int64_t tile1, uint8_t* codes, float* const* params);

}  // namespace rs
