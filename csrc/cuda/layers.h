// Terms of a codec on CUDA tensors, bound to their kernels: what linear.cpp and params.cpp share.
#pragma once

#include "../bind.h"
#include "launch.h"
#include "row.h"

namespace rs::cuda {

// A term with its kernels, its data on the device and its prepared tables.
struct DeviceTerm {
  const Row* row;
  CudaRow cuda;
  LayerView layer;
  Shape shape;
  // Kept alive: tables is empty where the codec needs none, and aligned, a copy of the codes, where
  // they are aligned as they come.
  at::Tensor codes, tables, aligned;

  at::TensorOptions floats() const { return codes.options().dtype(at::kFloat); }
  const float* param(int index) const { return index < 0 ? nullptr : layer.params[index]; }
  // Rows that a slice has to be a multiple of.
  int64_t unit() const;
  // Rows of a slice of about `weights` weights: whole units, at most all.
  int64_t slice_rows(int64_t weights) const;
  // Tile rows [row0, row1) in rows of T, all columns, into w (row1 - row0, layer.in).
  void decode(int64_t row0, int64_t row1, const at::Tensor& w) const;
};

struct DeviceTerms {
  Bound bound;
  std::vector<DeviceTerm> terms;
};

// Any of them being on a GPU is what brought the call here.
void check_place(const char* name, const at::Tensor& x, const at::Tensor& codes,
                 c10::string_view codec);
DeviceTerms bind_terms(const at::Tensor& codes, at::TensorList params, c10::string_view codec,
                       at::IntArrayRef shape);

// after * Hadamard(before * x) on the first n columns of x (rows, .), `width` columns wide.
at::Tensor through_frame(const at::Tensor& x, int64_t n, int64_t width, const float* before,
                         int64_t block, const float* after, at::ScalarType type);
// Both Hadamard transforms on whole blocks of rows of x (rows, layer.in), in place.
void rotate(const DeviceTerm& term, const at::Tensor& x);

// x as (rows, features) without gaps, in its own type.
at::Tensor flat(const at::Tensor& x, int64_t features);

}  // namespace rs::cuda
