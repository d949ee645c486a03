// The list of codecs: the only one in C++.
#pragma once

#include "cyclic.h"
#include "cyclic_scalar.h"
#include "residual.h"
#include "sparse.h"
#include "trellis.h"
#include "uniform.h"

namespace rs {

struct CodecEntry {
  const char* name;
  std::vector<Term> (*terms)(const Spec&, Shape);
};

constexpr CodecEntry kCodecs[] = {
    {"cyclic", cyclic_terms},
    {"cyclic_scalar", cyclic_scalar_terms},
    {"residual", residual_terms},
    {"sparse", sparse_terms},
    {"trellis", trellis_terms},
    {"uniform", uniform_terms},
};

}  // namespace rs
