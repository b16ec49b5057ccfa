// The kernels in portable C++ (GCC and Clang vector types), for any machine.
#include "kernels_impl.h"

namespace saesteer::cpu {
namespace {

float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}
uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return u;
}

float widen(float v) { return v; }
float widen(bf16 v) { return bits_to_float(uint32_t{v.bits} << 16); }
float widen(f16 v) {
  const uint32_t sign = uint32_t{v.bits & 0x8000u} << 16, rest = v.bits & 0x7FFFu;
  if (rest >= 0x7C00) return bits_to_float(sign | 0x7F800000 | (rest & 0x3FF) << 13);
  // Exponents differ by 112; the product is exact and makes subnormals normal.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
}

void narrow(float v, float* p) { *p = v; }
void narrow(float v, bf16* p) {
  const uint32_t u = float_to_bits(v);
  if (v != v)
    p->bits = static_cast<uint16_t>((u | 0x400000) >> 16);
  else
    p->bits = static_cast<uint16_t>((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}
void narrow(float v, f16* p) {
  const uint32_t u = float_to_bits(v), sign = u >> 16 & 0x8000, rest = u & 0x7FFFFFFF;
  uint32_t h;
  if (rest > 0x7F800000)
    h = 0x7E00 | (rest >> 13 & 0x3FF);
  else if (rest >= 0x477FF000)  // 65520 rounds to infinity
    h = 0x7C00;
  else if (rest < 0x38800000)  // subnormal: adding 0.5 lets fp32 round at 2^-24
    h = float_to_bits(bits_to_float(rest) + 0.5f) - 0x3F000000;
  else
    h = (rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13;
  p->bits = static_cast<uint16_t>(sign | h);
}

struct Plain {
  using reg __attribute__((vector_size(32))) = float;
  static constexpr int lanes = 8;
  static constexpr int tokens = 2;
  static constexpr int wide = 0;
  using Bf16Product = Widened<Plain, bf16, bf16>;

  template <class T>
  static reg load_part(const T* p, int n) {
    reg v = {};
    for (int i = 0; i < n; ++i) v[i] = widen(p[i]);
    return v;
  }
  template <class T>
  static reg load(const T* p) {
    return load_part(p, lanes);
  }
  template <class T>
  static void store_part(T* p, reg v, int n) {
    for (int i = 0; i < n; ++i) narrow(v[i], p + i);
  }
  template <class T>
  static void store(T* p, reg v) {
    store_part(p, v, lanes);
  }

  static reg set1(float v) { return reg{} + v; }
  static reg add(reg a, reg b) { return a + b; }
  static reg fma(reg a, reg b, reg c) { return a * b + c; }

  static float sum(reg a) {
    return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
  }
  static float4 sums(reg a, reg b, reg c, reg d) { return float4{sum(a), sum(b), sum(c), sum(d)}; }

  static uint32_t beats(reg p, reg threshold, bool ties) {
    uint32_t bits = 0;
    for (int i = 0; i < lanes; ++i)
      bits |= uint32_t{ties ? !(p[i] < threshold[i]) : !(p[i] <= threshold[i])} << i;
    return bits;
  }
};

}  // namespace

const Kernels plain_kernels = table<Plain>;

}  // namespace saesteer::cpu
