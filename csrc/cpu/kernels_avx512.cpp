// The kernels for AVX-512 (F, BW, VL, DQ).
#include "vec_avx512.h"

namespace saesteer::cpu {

const Kernels avx512_kernels = table<Avx512>;

}  // namespace saesteer::cpu
