// The 16-bit element types of the CPU kernels.
#pragma once

#include <cstdint>

#include "../views.h"

namespace saesteer::cpu {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace saesteer::cpu
