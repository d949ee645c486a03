// The list of codecs: the only one in C++.
#pragma once

#include "adaptive_precision.h"
#include "bitfield.h"
#include "block_sparse.h"
#include "cyclic.h"
#include "cyclic_scalar.h"
#include "hierarchical.h"
#include "hybrid.h"
#include "palette.h"
#include "residual.h"
#include "seed64.h"
#include "sparse.h"
#include "trellis.h"
#include "ultra.h"
#include "uniform.h"
#include "vq_cyclic.h"

namespace rs {

struct CodecEntry {
  const char* name;
  std::vector<Term> (*terms)(const Spec&, Shape);
};

constexpr CodecEntry kCodecs[] = {
    {"adaptive_precision", adaptive_precision_terms},
    {"bitfield", bitfield_terms},
    {"block_sparse", block_sparse_terms},
    {"cyclic", cyclic_terms},
    {"cyclic_scalar", cyclic_scalar_terms},
    {"hierarchical", hierarchical_terms},
    {"hybrid", hybrid_terms},
    {"palette", palette_terms},
    {"residual", residual_terms},
    {"seed64", seed64_terms},
    {"sparse", sparse_terms},
    {"trellis", trellis_terms},
    {"ultra", ultra_terms},
    {"uniform", uniform_terms},
    {"vq_cyclic", vq_cyclic_terms},
};

}  // namespace rs
