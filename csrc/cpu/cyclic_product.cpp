#include "cyclic_product.h"

namespace rs {

template <class Word>
void cyclic_product_slots(Row&, bool, Isa) {}

template void cyclic_product_slots<Cyclic16Word>(Row&, bool, Isa);
template void cyclic_product_slots<CyclicCompoundWord>(Row&, bool, Isa);
template void cyclic_product_slots<Cyclic32Word>(Row&, bool, Isa);

}  // namespace rs
