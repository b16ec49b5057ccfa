// The kernels for AVX-512 with BF16: as AVX-512, but two bf16 rows are multiplied by vdpbf16ps, and
// results rounded to bf16 by vcvtne2ps2bf16.
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

  static void store_two(bf16* p, reg low, reg high) {
    // vcvtne2ps2bf16 flushes subnormals.
    constexpr int kSubnormal = 0x20;
    const __mmask16 flushed =
        _mm512_fpclass_ps_mask(low, kSubnormal) | _mm512_fpclass_ps_mask(high, kSubnormal);
    if (__builtin_expect(flushed, 0)) {
      store(p, low);
      store(p + lanes, high);
    } else {
      _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }
};

}  // namespace

const Kernels avx512bf16_kernels = table<Avx512Bf16>;

}  // namespace saesteer::cpu
