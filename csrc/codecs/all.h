// The list of codecs: the only one in C++.
#pragma once

#include "hierarchical.h"
#include "palette.h"
#include "residual.h"
#include "sparse.h"
#include "trellis.h"
#include "uniform.h"
#include "vq_cyclic.h"

namespace rs {

struct CodecEntry {
  const char* name;
  std::vector<Term> (*terms)(const Spec&, Shape);
};

constexpr CodecEntry kCodecs[] = {
    {"hierarchical", hierarchical_terms},
    {"palette", palette_terms},
    {"residual", residual_terms},
    {"sparse", sparse_terms},
    {"trellis", trellis_terms},
    {"uniform", uniform_terms},
    {"vq_cyclic", vq_cyclic_terms},
};

}  // namespace rs
