// What the processor can do, asked of it, and what SAESTEER_CPU_ISA allows.
#include "isa.h"

#ifdef SAESTEER_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace saesteer::cpu {
namespace {

#ifdef SAESTEER_X86
// Whether there are tiles of bf16, and Linux lets this process have them.
bool has_amx() {
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile)) != (kBf16 | kTile))
    return false;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

}  // namespace

Isa detected_isa() {
#ifdef SAESTEER_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return has_amx() ? Isa::amx : Isa::avx512bf16;
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
    case Isa::amx:
      return "amx";
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
