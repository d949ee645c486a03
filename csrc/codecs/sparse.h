// The largest weights of each row, as int8 against one scale per row; all others are zero.
//
//   tile      1 x in weights (one row); with n = round(percent/100 * in), at least 1:
//   byte      0       2          2+2n
//             | count | column[n] | value[n] |      count and columns uint16, values int8
//   Columns rise; entries from `count` on are zero.   w[column] = fl32(value * scale)
//
// Params: scale (out).
#pragma once

#include "../codec.h"

namespace rs {

// spec: sparse(percent=1)
std::vector<Term> sparse_terms(const Spec& spec, Shape shape);

}  // namespace rs
