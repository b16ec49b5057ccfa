// What the processor can do, asked of it, and what SAESTEER_CPU_ISA allows.
#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace saesteer::cpu {

Isa detected_isa() {
#ifdef SAESTEER_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512bf16;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::plain;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::plain:
      return "plain";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512bf16:
      return "avx512bf16";
  }
  return "unknown";
}

static Isa chosen_isa() {
  const Isa best = detected_isa();
  const char* wanted = std::getenv("SAESTEER_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  std::string accepted;
  for (int i = 0; i <= static_cast<int>(best); ++i) {
    const char* name = isa_name(static_cast<Isa>(i));
    if (name == std::string(wanted)) return static_cast<Isa>(i);
    accepted += (i ? ", " : "") + std::string(name);
  }
  throw std::runtime_error("SAESTEER_CPU_ISA is \"" + std::string(wanted) +
                           "\"; this machine has " + accepted);
}

Isa isa_in_use() {
  static const Isa isa = chosen_isa();
  return isa;
}

}  // namespace saesteer::cpu
