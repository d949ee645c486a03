// The direct product of `cyclic`: dot products with the basis once per block of x, then a lookup
// and a multiply-add per code.
#pragma once

#include "../codecs/cyclic.h"
#include "isa.h"

namespace rs {

template <class Word>
void cyclic_product_slots(Row& row, bool integers, Isa isa);

}  // namespace rs
