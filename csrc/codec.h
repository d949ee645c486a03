// The contract between a codec and everything else, in words and in types.
//
// A weight matrix W (out, in) is a sum of one or more terms. Each term is an *inner* matrix T of
// tiles, each decoded on its own from a fixed number of bytes, seen through a *frame*:
//
//     W = diag(out_scale) * Hadamard_out * T * Hadamard_in * diag(in_scale)
//
// with either scale and either Hadamard matrix left out. A codec fills one Row per term: sizes, the
// params in order, the frame, and slots (function pointers). Everything around the slots (frames,
// panels, gradients, threads, argument checks) is written once, in cpu/ops.cpp, for all codecs.
//
// A Row is resolved for one Spec and Shape, so templates over bit widths are chosen here once and
// nothing else in the program switches over codecs.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "spec.h"

namespace rs {

struct Shape {
  int64_t out, in;
};

// The smallest rectangle of T that decodes on its own. Codes are uint8 (out/rows, in/cols, bytes).
struct Tile {
  int64_t rows, cols, bytes;
};

// How a param is cut when the codes are cut along dimension 0 (out) or 1 (in).
enum class Axis { out, in, both, shared };

struct ParamSpec {
  std::string name;
  Axis axis;
  std::vector<int64_t> sizes;
  bool codes = false;  // uint8, never trained; all others are float32
};

// A term bound to data. `params` follows Row::params; uint8 params are reinterpreted by their
// codec. All pointers are contiguous. out and in are the padded sizes: multiples of the tile.
struct Layer {
  const Spec* spec;
  int64_t out, in;
  Tile tile;
  const uint8_t* codes;
  std::vector<const float*> params;

  int64_t tile_rows() const { return out / tile.rows; }
  int64_t tile_cols() const { return in / tile.cols; }
};

// What an encoder may use beside the weight. `importance` is a positive weight per input column or
// null.
struct EncodeOptions {
  const float* importance = nullptr;
};

// Slots work on T alone, in padded sizes, row-major; rows come in multiples of Tile::rows.
struct Row {
  std::string name;
  Tile tile;
  std::vector<ParamSpec> params;

  // Frame: indices into params, or -1; Hadamard block sizes, 1 for none.
  int out_scale = -1, in_scale = -1;
  int64_t out_block = 1, in_block = 1;

  // w[(row1-row0) * in]: rows [row0, row1) of T. Bit-exact on every instruction set.
  void (*decode)(const Layer&, int64_t row0, int64_t row1, float* w) = nullptr;
  // The same rounded once to bfloat16, for panels. Optional: falls back to `decode`.
  void (*decode_bf16)(const Layer&, int64_t row0, int64_t row1, uint16_t* w) = nullptr;
  // Adds the gradient of every param to grads[i], given dw[(row1-row0) * in] = dLoss/dT. A null
  // grads[i] is not wanted. Called on one thread per row range; shared params get private buffers.
  void (*adjoint)(const Layer&, int64_t row0, int64_t row1, const float* dw,
                  float* const* grads) = nullptr;
  // y[m * out] = x[m * in] @ T^T straight from the codes, for m <= linear_max_m. Optional; threads
  // itself with parallel_for. Its compute type is in `linear_type`, for doctor and the tests.
  void (*linear)(const Layer&, const float* x, int64_t m, float* y) = nullptr;
  int64_t linear_max_m = 0;
  const char* linear_type = "float32";
  // dx[m * in] = dy[m * out] @ T, any m. Optional: falls back to panels. For codecs whose settings
  // name the arithmetic of both directions; its compute type is `linear_type` too.
  void (*linear_grad_input)(const Layer&, const float* dy, int64_t m, float* dx) = nullptr;
  // Codes of tiles [tile0, tile1) of T (tile = row * tile_cols + col) for the target w[out * in],
  // and the params the codec fits per tile (others are read from layer.params). Codes come in
  // zeroed.
  void (*encode)(const Layer&, const float* w, const EncodeOptions&, int64_t tile0, int64_t tile1,
                 uint8_t* codes, float* const* params) = nullptr;
  // Tiles an encode call should get at once (a multiple keeps vector lanes full).
  int64_t encode_batch = 64;
  // Throws std::invalid_argument when tile's bytes are no valid code. Null: every byte string is.
  void (*check)(const Layer&, int64_t tile) = nullptr;
};

// One term of a codec: its row, where its codes are (-1: the op's `codes`; otherwise that param of
// the op) and where its params start in the op's list. `params` of the op is the terms' in order,
// each preceded by its codes when those are a param.
struct Term {
  Row row;
  int codes_param = -1;
  int first_param = 0;
  std::string prefix;  // of the param names: "" or "rest_"
  Spec spec;
};

// Rows padded up to the tile.
inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Largest power of two up to 128 that divides n; 1 for nothing.
inline int64_t hadamard_block(int64_t n) {
  int64_t block = 1;
  while (n && block < 128 && n % (2 * block) == 0) block *= 2;
  return block;
}

// The terms of a codec for a weight of this shape. Throws std::invalid_argument in one sentence
// when the spec names no codec or a setting outside its range.
std::vector<Term> resolve(const Spec& spec, Shape shape);

}  // namespace rs
