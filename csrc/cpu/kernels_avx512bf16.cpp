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

  // Even and odd elements apart: a bf16 in either half of a word is widened by one operation.
  struct Sum {
    __m512 even, odd;
    bool large;  // so large that no bf16 added to it leaves a subnormal
  };
  static Sum load_sum(const float* p) {
    const __m512i even =
        _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    constexpr int kLesserMagnitude = 0xA;
    const __m512 low = _mm512_loadu_ps(p), high = _mm512_loadu_ps(p + 16);
    const __m512 least = _mm512_range_ps(low, high, kLesserMagnitude);
    return {_mm512_permutex2var_ps(low, even, high),
            _mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high),
            !_mm512_cmp_ps_mask(least, _mm512_set1_ps(0x1p-100f), _CMP_NGE_UQ)};
  }
  static void store_added(bf16* y, reg x, const Sum& sum) {
    const __m512i u = (__m512i)x, top = _mm512_set1_epi32(0xFFFF0000);
    // vdpbf16ps adds 1 times the even elements and 0 times the odd ones: exact but for subnormals,
    // which it takes for 0, and infinities.
    const __m512bh evens = (__m512bh)_mm512_set1_epi32(0x3F80);
    const __m512 even =
        __builtin_expect(sum.large, 1)
            ? _mm512_dpbf16_ps(sum.even, x, evens)
            : _mm512_add_ps(_mm512_castsi512_ps(_mm512_slli_epi32(u, 16)), sum.even);
    const __m512 odd = _mm512_add_ps(_mm512_castsi512_ps(_mm512_and_si512(u, top)), sum.odd);
    const __m512i apart = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    if (__builtin_expect(!sum.large && flushed(apart, even, odd), 0)) {
      const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
      const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
      Avx512::store(y, _mm512_permutex2var_ps(even, low, odd));
      Avx512::store(y + 16, _mm512_permutex2var_ps(even, high, odd));
    } else {
      const __m512i mixed =
          _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                           6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
      _mm512_storeu_si512(y, _mm512_permutexvar_epi16(mixed, apart));
    }
  }

  // Whether vcvtne2ps2bf16, which made `rounded` of the others, flushed a subnormal to 0.
  static bool flushed(__m512i rounded, __m512 low, __m512 high) {
    if (__builtin_expect(!_mm512_testn_epi16_mask(rounded, _mm512_set1_epi16(0x7FFF)), 1))
      return false;
    constexpr int kSubnormal = 0x20;
    return _mm512_fpclass_ps_mask(low, kSubnormal) | _mm512_fpclass_ps_mask(high, kSubnormal);
  }
};

struct Avx512Bf16 : Avx512 {
  using Bf16Product = PairProduct;

  static void store_two(bf16* p, reg low, reg high) {
    const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    if (__builtin_expect(PairProduct::flushed(rounded, low, high), 0)) {
      store(p, low);
      store(p + lanes, high);
    } else {
      _mm512_storeu_si512(p, rounded);
    }
  }
};

}  // namespace

const Kernels avx512bf16_kernels = table<Avx512Bf16>;

}  // namespace saesteer::cpu
