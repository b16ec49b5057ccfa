// The kernels for AVX2 with FMA and F16C: eight fp32 lanes.
#include <immintrin.h>

#include "kernels_impl.h"

namespace saesteer::cpu {
namespace {

struct Avx2 {
  using reg = __m256;
  static constexpr int lanes = 8;
  static constexpr int tokens = 3;
  static constexpr int wide = 1;
  using Bf16Product = Widened<Avx2, bf16, bf16>;

  static reg load(const float* p) { return _mm256_loadu_ps(p); }
  static reg load(const bf16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static reg load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  template <class T>
  static reg load_part(const T* p, int n) {
    T buffer[lanes] = {};
    std::memcpy(buffer, p, n * sizeof(T));
    return load(buffer);
  }

  static void store(float* p, reg v) { _mm256_storeu_ps(p, v); }
  static void store(bf16* p, reg v) {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i h = _mm256_srli_epi32(_mm256_blendv_epi8(r, quiet, nan), 16);
    _mm_storeu_si128((__m128i*)p,
                     _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1)));
  }
  static void store(f16* p, reg v) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  template <class T>
  static void store_part(T* p, reg v, int n) {
    T buffer[lanes];
    store(buffer, v);
    std::memcpy(p, buffer, n * sizeof(T));
  }

  static reg set1(float v) { return _mm256_set1_ps(v); }
  static reg add(reg a, reg b) { return _mm256_add_ps(a, b); }
  static reg fma(reg a, reg b, reg c) { return _mm256_fmadd_ps(a, b, c); }

  static float4 sums(reg a, reg b, reg c, reg d) {
    const reg s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return (float4)_mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  }

  static uint32_t beats(reg p, reg threshold, bool ties) {
    return _mm256_movemask_ps(ties ? _mm256_cmp_ps(p, threshold, _CMP_NLT_UQ)
                                   : _mm256_cmp_ps(p, threshold, _CMP_NLE_UQ));
  }
};

}  // namespace

const Kernels avx2_kernels = table<Avx2>;

}  // namespace saesteer::cpu
