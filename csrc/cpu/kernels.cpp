// Which table of inner loops is used.
#include "kernels.h"

namespace saesteer::cpu {

static const Kernels& chosen_kernels() {
  switch (isa_in_use()) {
#ifdef SAESTEER_X86
    case Isa::avx2:
      return avx2_kernels;
    case Isa::avx512:
      return avx512_kernels;
    case Isa::avx512bf16:
    case Isa::amx:
      return avx512bf16_kernels;
#endif
    default:
      return plain_kernels;
  }
}

const Kernels& kernels() {
  static const Kernels& table = chosen_kernels();
  return table;
}

const Tiles* tiles() {
#ifdef SAESTEER_X86
  static const bool there = isa_in_use() == Isa::amx;
  if (there) return &amx_tiles;
#endif
  return nullptr;
}

}  // namespace saesteer::cpu
