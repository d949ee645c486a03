// W = decode(base) + decode(rest): any two codecs, the second on what the first left over.
//
// Codes: the base's. Params: the base's; rest_codes (uint8, the rest's codes); the rest's with the
// prefix rest_. The sum of the two float32 matrices is rounded once.
#pragma once

#include "../codec.h"

namespace rs {

// spec: residual(base=trellis(...), rest=uniform(...))
std::vector<Term> residual_terms(const Spec& spec, Shape shape);

}  // namespace rs
