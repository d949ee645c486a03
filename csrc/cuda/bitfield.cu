#include "../codecs/bitfield.h"

#include "../codecs/radial_functions.h"
#include "../trig.h"
#include "codecs.h"
#include "loops.cuh"
#include "tables.h"

namespace rs::cuda {
namespace {

// What decode needs of r_max and the basis.
template <int Word>
struct RadialTables {
  static constexpr int kEntries = radial_entries(Word);
  float value[kEntries], slope[kEntries], cosine[kTurn];
  // Bits of the largest |value|, |slope| and |basis|: of gradients only.
  uint32_t largest_value, largest_slope, largest_basis;
};

template <int Word, int Kind = 0>
__device__ __forceinline__ void tabulate(int kind, int n, float r_max, RadialTables<Word>& tables) {
  if (kind == Kind)
    radial::tabulate<Kind, Kind + 1>(Word, n, r_max, tables.value, tables.slope);
  else if constexpr (Kind + 1 < radial::kKinds)
    tabulate<Word, Kind + 1>(kind, n, r_max, tables);
}

// Made anew by every call, since r_max is trained where the host does not see it: so a thread owns
// a radius and one kind of function, and computes nothing for others.
template <int Word>
__global__ void __launch_bounds__(32)
    radius_kernel(const float* __restrict__ r_max, RadialTables<Word>* __restrict__ tables) {
  const int n = static_cast<int>(blockIdx.x * 32 + threadIdx.x);
  if (blockIdx.y == 0 && n < kTurn)
    tables->cosine[n] = static_cast<float>(turn_cosine(static_cast<uint64_t>(n), kTurn));
  tabulate<Word>(static_cast<int>(blockIdx.y), n, held_r_max(*r_max), *tables);
}

// One block: the largest magnitudes of the tables and the basis. They order like their bits.
template <int Word>
__global__ void __launch_bounds__(1024)
    largest_kernel(const float* __restrict__ basis, int64_t n, RadialTables<Word>* tables) {
  __shared__ uint32_t largest[3];
  if (threadIdx.x < 3) largest[threadIdx.x] = 0;
  __syncthreads();
  const auto raise = [&](int which, const float* x, int64_t count) {
    uint32_t most = 0;
    for (int64_t i = threadIdx.x; i < count; i += 1024)
      most = max(most, std::bit_cast<uint32_t>(x[i]) & 0x7FFFFFFFu);
    atomicMax(&largest[which], most);
  };
  raise(0, tables->value, RadialTables<Word>::kEntries);
  raise(1, tables->slope, RadialTables<Word>::kEntries);
  raise(2, basis, n);
  __syncthreads();
  if (threadIdx.x == 0) {
    tables->largest_value = largest[0];
    tables->largest_slope = largest[1];
    tables->largest_basis = largest[2];
  }
}

template <int Word>
cudaError_t prepare(const LayerView& layer, cudaStream_t stream) {
  using Codec = Bitfield<Word, Amplitude::byte>;
  static_assert(radial_radii(Word) >= kTurn);
  return run(radius_kernel<Word>, dim3(radial_radii(Word) / 32, radial::kKinds), 32, 0, stream,
             layer.params[Codec::kRMax], static_cast<RadialTables<Word>*>(layer.tables));
}

template <int Word, Amplitude Width, int Unit>
struct BitfieldUnits {
  using Codec = Bitfield<Word, Width>;
  static constexpr int kUnit = Unit;

  struct Tables {
    const RadialTables<Word>& radial;
    const float *basis, *r_max;
    int64_t block;
    RS_HD explicit Tables(const LayerView& layer)
        : radial(*static_cast<const RadialTables<Word>*>(layer.tables)),
          basis(layer.params[Codec::kBasisParam]),
          r_max(layer.params[Codec::kRMax]),
          block(layer.tile.cols / Codec::kCodes) {}

    // Exponents that make the terms of either kind of sum at most max |dw|: powers of two, so that
    // nothing is rounded. 126 bounds them; what is larger is not finite.
    RS_HD static int exponent(uint32_t bits) { return static_cast<int>(bits >> 23) - 126; }
    RS_HD static float power(int exponent) {
      const int held = exponent < -126 ? -126 : exponent > 127 ? 127 : exponent;
      return std::bit_cast<float>(static_cast<uint32_t>(held + 127) << 23);
    }
    RS_HD int value_exponent() const { return exponent(radial.largest_value) + 1; }
    RS_HD int slope_exponent() const { return exponent(radial.largest_slope) + 1; }
    RS_HD int basis_exponent() const { return exponent(radial.largest_basis) + 3; }
  };
  static_assert(Unit <= 8);  // basis_exponent

  // The unit's code, and its part of the basis vector.
  struct Place {
    int k;
    uint32_t code;
    int64_t first;
    RS_HD Place(const uint8_t* tile, int unit, const Tables& t)
        : k(static_cast<int>(unit * int64_t{Unit} / t.block)),
          code(Codec::code(tile, k)),
          first(Codec::index(code) * t.block + unit * int64_t{Unit} - k * t.block) {}
  };

  RS_HD static void decode(const uint8_t* tile, int64_t, int64_t, int unit, const Tables& t,
                           float* w) {
    const Place at(tile, unit, t);
    const float f = Codec::factor(tile, at.k, at.code, t.radial.value, t.radial.cosine);
    for (int j = 0; j < Unit; ++j) w[j] = mul(f, t.basis[at.first + j]);
  }

  // Shared sums: the gradient of the basis, then that of r_max, both times a power of two.
  static constexpr int kGain = 1;
  RS_HD static int64_t sums(const LayerView& layer) {
    return kBasis * (layer.tile.cols / Codec::kCodes) + 1;
  }
  template <class Sums>
  RS_HD static void adjoint(const uint8_t* tile, int64_t, int64_t, int unit, const Tables& t,
                            const float* dw, Sums& sums) {
    const Place at(tile, unit, t);
    const float f = mul(Codec::factor(tile, at.k, at.code, t.radial.value, t.radial.cosine),
                        Tables::power(-t.value_exponent())),
                slope = mul(Codec::factor(tile, at.k, at.code, t.radial.slope, t.radial.cosine),
                            Tables::power(-t.slope_exponent())),
                unit_of_basis = Tables::power(-t.basis_exponent());
    float dot = 0;
    for (int j = 0; j < Unit; ++j) {
      sums.shared(at.first + j, f * dw[j]);
      dot += mul(t.basis[at.first + j], unit_of_basis) * dw[j];
    }
    sums.shared(kBasis * t.block, slope * dot);
  }
  RS_HD static void fold(int f, const Tables& t, const double* sum, float* const* grads) {
    const auto times = [](double v, int exponent) {
      return v * Tables::power(exponent / 2) * Tables::power(exponent - exponent / 2);
    };
    if (f < kBasis * t.block) {
      if (grads[Codec::kBasisParam])
        grads[Codec::kBasisParam][f] += static_cast<float>(times(sum[f], t.value_exponent()));
    } else if (grads[Codec::kRMax] && *t.r_max > kLeastRadius && *t.r_max < kLargestRadius) {
      grads[Codec::kRMax][0] +=
          static_cast<float>(times(sum[f], t.slope_exponent() + t.basis_exponent()));
    }
  }
};

template <class Units, int Word>
cudaError_t adjoint(const LayerView& layer, int64_t row0, int64_t row1, const float* dw,
                    const float* largest, void* sums, float* const* grads, cudaStream_t stream) {
  const cudaError_t error =
      run(largest_kernel<Word>, 1, 1024, 0, stream, layer.params[Units::Codec::kBasisParam],
          Units::sums(layer) - 1, static_cast<RadialTables<Word>*>(layer.tables));
  return error == cudaSuccess
             ? adjoint_loop<Units>(layer, row0, row1, dw, largest, sums, grads, stream)
             : error;
}

template <int Word, Amplitude Width, int Unit>
CudaRow row_of(int64_t block) {
  using Units = BitfieldUnits<Word, Width, Unit>;
  CudaRow row = loop_row<Units>(kBasis * block + 1);
  row.adjoint = adjoint<Units, Word>;
  row.table_bytes = sizeof(RadialTables<Word>);
  row.prepare = prepare<Word>;
  return row;
}

template <int Word, Amplitude Width>
CudaRow row_of(const Term& term) {
  const int64_t block = term.row.tile.cols / Bitfield<Word, Width>::kCodes;
  return block % 8 ? row_of<Word, Width, 1>(block) : row_of<Word, Width, 8>(block);
}

}  // namespace

CudaRow bitfield_row(const Term& term) {
  if (term.spec.number("word", 22) == 32) return row_of<32, Amplitude::byte>(term);
  const std::string amplitude = term.spec.word("amplitude", "byte");
  if (amplitude == "uint16") return row_of<22, Amplitude::uint16>(term);
  return amplitude == "float32" ? row_of<22, Amplitude::float32>(term)
                                : row_of<22, Amplitude::byte>(term);
}

}  // namespace rs::cuda
