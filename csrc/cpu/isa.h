// Which instruction set the kernels use. One binary holds all of them.
#pragma once

namespace rs {

// avx512 means F, BW, DQ, VL, VBMI, VBMI2 and VNNI; avx2 means AVX2 and FMA.
enum class Isa { generic = 0, avx2 = 1, avx512 = 2 };

// The best this processor has, lowered by REALITY_STONE_ISA=generic|avx2|avx512 or set_isa().
Isa current_isa();
Isa best_isa();
void set_isa(Isa isa);  // throws std::invalid_argument above best_isa()
bool has_avx512_bf16();
const char* isa_name(Isa isa);

}  // namespace rs
