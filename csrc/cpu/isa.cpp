#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace rs {
namespace {

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
      __builtin_cpu_supports("avx512vnni"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::generic;
}

// A wrong or unreachable name in the environment is ignored here; doctor reports it.
Isa initial() {
  const char* wanted = std::getenv("REALITY_STONE_ISA");
  for (Isa isa : {Isa::generic, Isa::avx2, Isa::avx512})
    if (wanted && !std::strcmp(wanted, isa_name(isa)) && isa <= best_isa()) return isa;
  return best_isa();
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{initial()};
  return isa;
}

}  // namespace

Isa best_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa current_isa() { return current().load(std::memory_order_relaxed); }

void set_isa(Isa isa) {
  if (isa > best_isa())
    throw std::invalid_argument(std::string("this processor has no ") + isa_name(isa));
  current() = isa;
}

bool has_avx512_bf16() {
#if defined(__x86_64__)
  static const bool has = best_isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
  return has && current_isa() == Isa::avx512;
#else
  return false;
#endif
}

const char* isa_name(Isa isa) {
  constexpr const char* names[] = {"generic", "avx2", "avx512"};
  return names[static_cast<int>(isa)];
}

}  // namespace rs
