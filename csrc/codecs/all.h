// The list of codecs: the only one in C++.
#pragma once

#include "adaptive_precision.h"
#include "block_sparse.h"
#include "hybrid.h"
#include "residual.h"
#include "seed64.h"
#include "sparse.h"
#include "trellis.h"
#include "uniform.h"

namespace rs {

struct CodecEntry {
  const char* name;
  std::vector<Term> (*terms)(const Spec&, Shape);
};

constexpr CodecEntry kCodecs[] = {
    {"adaptive_precision", adaptive_precision_terms},
    {"block_sparse", block_sparse_terms},
    {"hybrid", hybrid_terms},
    {"residual", residual_terms},
    {"seed64", seed64_terms},
    {"sparse", sparse_terms},
    {"trellis", trellis_terms},
    {"uniform", uniform_terms},
};

}  // namespace rs
