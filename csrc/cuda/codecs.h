// The codecs that have kernels: the only list of them here.
#pragma once

#include "row.h"

namespace rs::cuda {

CudaRow adaptive_precision_row(const Term&);
CudaRow bitfield_row(const Term&);
CudaRow block_sparse_row(const Term&);
CudaRow cyclic_row(const Term&);
CudaRow cyclic_scalar_row(const Term&);
CudaRow hierarchical_row(const Term&);
CudaRow hybrid_row(const Term&);
CudaRow palette_row(const Term&);
CudaRow seed64_row(const Term&);
CudaRow sparse_row(const Term&);
CudaRow trellis_row(const Term&);
CudaRow ultra_row(const Term&);
CudaRow uniform_row(const Term&);
CudaRow vq_cyclic_row(const Term&);

struct CudaEntry {
  const char* name;
  CudaRow (*row)(const Term&);
};

constexpr CudaEntry kCudaRows[] = {
    {"adaptive_precision", adaptive_precision_row},
    {"bitfield", bitfield_row},
    {"block_sparse", block_sparse_row},
    {"cyclic", cyclic_row},
    {"cyclic_scalar", cyclic_scalar_row},
    {"hierarchical", hierarchical_row},
    {"hybrid", hybrid_row},
    {"palette", palette_row},
    {"seed64", seed64_row},
    {"sparse", sparse_row},
    {"trellis", trellis_row},
    {"ultra", ultra_row},
    {"uniform", uniform_row},
    {"vq_cyclic", vq_cyclic_row},
};

}  // namespace rs::cuda
