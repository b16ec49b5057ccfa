// The kernels in portable C++ (GCC and Clang vector types), for any machine.
#include "kernels_impl.h"

namespace saesteer::cpu {
namespace {

using word4 __attribute__((vector_size(16))) = uint32_t;

template <class T>
word4 bits_of(const T* p) {
  return word4{p[0].bits, p[1].bits, p[2].bits, p[3].bits};
}
template <class T>
void set_bits(T* p, word4 u) {
  for (int i = 0; i < 4; ++i) p[i].bits = static_cast<uint16_t>(u[i]);
}
// a in the lanes that satisfy `mask`, b in the others.
template <class M>
word4 choose(M mask, word4 a, word4 b) {
  return ((word4)mask & a) | (~(word4)mask & b);
}

float4 widen(const float* p) {
  float4 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
float4 widen(const bf16* p) { return (float4)(bits_of(p) << 16); }
float4 widen(const f16* p) {
  const word4 u = bits_of(p), rest = u & 0x7FFF;
  const word4 not_finite = (word4)(rest >= 0x7C00) & 0x7F800000;
  // Exponents differ by 112; the product is exact and makes subnormals normal.
  const word4 magnitude = (word4)((float4)(rest << 13) * 0x1p112f);
  return (float4)((u & 0x8000) << 16 | not_finite | magnitude);
}

void narrow(float4 v, float* p) { std::memcpy(p, &v, sizeof v); }
void narrow(float4 v, bf16* p) {
  const word4 u = (word4)v, rounded = u + 0x7FFF + (u >> 16 & 1), quiet = u | 0x400000;
  set_bits(p, choose(v != v, quiet, rounded) >> 16);
}
void narrow(float4 v, f16* p) {
  const word4 u = (word4)v, rest = u & 0x7FFFFFFF, infinity = word4{} + 0x7C00;
  const word4 nan = 0x7E00 | (rest >> 13 & 0x3FF);
  const word4 normal = (rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13;
  const word4 subnormal = (word4)((float4)rest + 0.5f) - 0x3F000000;  // fp32 rounds at 2^-24
  word4 h = choose(rest < 0x38800000, subnormal, normal);
  h = choose(rest >= 0x477FF000, infinity, h);  // 65520 rounds to it
  h = choose(rest > 0x7F800000, nan, h);
  set_bits(p, (u >> 16 & 0x8000) | h);
}

// By chance a compiler fuses a * b + c in one tile and not in another; no p_j may depend on that.
float4 multiply_add(float4 a, float4 b, float4 c) {
#ifdef __FP_FAST_FMAF
  for (int i = 0; i < 4; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}

struct Plain {
  struct reg {
    float4 low, high;  // a vector wider than the machine's would live in memory
  };
  static constexpr int lanes = 8;
  static constexpr int tokens = 2;
  static constexpr int wide = 0;
  using Bf16Product = Widened<Plain, bf16, bf16>;

  template <class T>
  static reg load(const T* p) {
    return {widen(p), widen(p + 4)};
  }
  template <class T>
  static reg load_part(const T* p, int n) {
    T buffer[lanes] = {};
    std::memcpy(buffer, p, n * sizeof(T));
    return load(buffer);
  }
  template <class T>
  static void store(T* p, reg v) {
    narrow(v.low, p), narrow(v.high, p + 4);
  }
  template <class T>
  static void store_part(T* p, reg v, int n) {
    T buffer[lanes];
    store(buffer, v);
    std::memcpy(p, buffer, n * sizeof(T));
  }

  static reg set1(float v) { return {v - float4{}, v - float4{}}; }  // -0 too
  static reg add(reg a, reg b) { return {a.low + b.low, a.high + b.high}; }
  static reg fma(reg a, reg b, reg c) {
    return {multiply_add(a.low, b.low, c.low), multiply_add(a.high, b.high, c.high)};
  }

  static float sum(reg a) {
    const float4 s = a.low + a.high;
    return (s[0] + s[2]) + (s[1] + s[3]);
  }
  static float4 sums(reg a, reg b, reg c, reg d) { return float4{sum(a), sum(b), sum(c), sum(d)}; }

  static uint32_t beats(reg p, reg threshold, bool ties) {
    const auto low = ties ? ~(p.low < threshold.low) : ~(p.low <= threshold.low);
    const auto high = ties ? ~(p.high < threshold.high) : ~(p.high <= threshold.high);
    uint32_t bits = 0;
    for (int i = 0; i < 4; ++i) bits |= (low[i] & 1u) << i | (high[i] & 1u) << (i + 4);
    return bits;
  }
};

}  // namespace

const Kernels plain_kernels = table<Plain>;

}  // namespace saesteer::cpu
