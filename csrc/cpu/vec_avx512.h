// Sixteen fp32 lanes of AVX-512.
#pragma once

#include <immintrin.h>

#include "kernels_impl.h"

namespace saesteer::cpu {
namespace {

struct Avx512 {
  using reg = __m512;
  static constexpr int lanes = 16;
  static constexpr int tokens = 6;
  static constexpr int wide = 2;
  using Bf16Product = Widened<Avx512, bf16, bf16>;

  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }

  static reg load(const float* p) { return _mm512_loadu_ps(p); }
  static reg load(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
  static reg load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static reg load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static reg load_part(const bf16* p, int n) {
    return widen(_mm256_maskz_loadu_epi16(first(n), p));
  }
  static reg load_part(const f16* p, int n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p));
  }

  static void store(float* p, reg v) { _mm512_storeu_ps(p, v); }
  static void store(bf16* p, reg v) { _mm256_storeu_si256((__m256i*)p, to_bf16(v)); }
  static void store(f16* p, reg v) { _mm256_storeu_si256((__m256i*)p, to_f16(v)); }
  static void store_part(float* p, reg v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
  static void store_part(bf16* p, reg v, int n) {
    _mm256_mask_storeu_epi16(p, first(n), to_bf16(v));
  }
  static void store_part(f16* p, reg v, int n) { _mm256_mask_storeu_epi16(p, first(n), to_f16(v)); }

  static reg set1(float v) { return _mm512_set1_ps(v); }
  static reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
  static reg fma(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }

  static float4 sums(reg a, reg b, reg c, reg d) {
    const reg ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const reg cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const reg s = add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
    const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
    return (float4)_mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  }

  static uint32_t beats(reg p, reg threshold, bool ties) {
    return ties ? _mm512_cmp_ps_mask(p, threshold, _CMP_NLT_UQ)
                : _mm512_cmp_ps_mask(p, threshold, _CMP_NLE_UQ);
  }

 private:
  static reg widen(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  // Not vcvtneps2bf16, which flushes subnormals.
  static __m256i to_bf16(reg v) {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(r, nan, quiet), 16));
  }
  static __m256i to_f16(reg v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
};

}  // namespace
}  // namespace saesteer::cpu
