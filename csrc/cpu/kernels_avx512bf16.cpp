// The kernels for AVX-512 with BF16: as AVX-512, with two bf16 rows multiplied by vdpbf16ps.
#include "vec_avx512.h"

namespace saesteer::cpu {
namespace {

struct PairProduct {
  using x_type = bf16;
  using w_type = bf16;
  using reg = __m512bh;
  static constexpr int step = 32;
  static constexpr bool native = true;

  static reg load(const bf16* p) { return (reg)_mm512_loadu_si512(p); }
  static reg load_part(const bf16* p, int n) {
    return (reg)_mm512_maskz_loadu_epi16((__mmask32{1} << n) - 1, p);
  }
  static __m512 mul_add(reg x, reg w, __m512 acc) { return _mm512_dpbf16_ps(acc, x, w); }
};

struct Avx512Bf16 : Avx512 {
  using Bf16Product = PairProduct;
};

}  // namespace

const Kernels avx512bf16_kernels = table<Avx512Bf16>;

}  // namespace saesteer::cpu
