// The inner loops, written once over a vector type V; each kernels_*.cpp brings its own V and
// instantiates `table<V>`. V has
//   reg, lanes, tokens, wide    registers; rows of x a tile takes; up to how many it takes 8 rows
//   of w load, load_part(p, n)       of float, bf16, f16, as fp32; past n < lanes zeros store,
//   store_part           of fp32, rounding to nearest even set1, add, fma, sums        sums(a, b,
//   c, d): the four registers' own sums, as a float4 beats(p, threshold, ties)   a bit a lane
//   Bf16Product                 how two bf16 rows are multiplied (Widened, or the machine's own
//   way)
#pragma once

#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace saesteer::cpu {
namespace {

using float4 __attribute__((vector_size(16))) = float;

// Rows of X times rows of W in fp32, `step` elements at a time.
template <class V, class X, class W>
struct Widened {
  using x_type = X;
  using w_type = W;
  using reg = typename V::reg;
  static constexpr int step = V::lanes;
  static constexpr bool native = false;

  template <class T>
  static reg load(const T* p) {
    return V::load(p);
  }
  template <class T>
  static reg load_part(const T* p, int n) {
    return V::load_part(p, n);
  }
  static typename V::reg mul_add(reg x, reg w, typename V::reg acc) { return V::fma(x, w, acc); }

  using Sum = reg;
  static Sum load_sum(const float* p) { return V::load(p); }
  static void store_added(X* y, reg x, Sum sum) { V::store(y, V::add(x, sum)); }
};

// out[i * kBlock + j] = the sum of acc[i][j] + bias[j]
template <class V, int M, int N>
inline void store_dots(const typename V::reg (&acc)[M][N], const float* bias, float* out) {
  const auto none = V::set1(0.f);
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < N; j += 4) {
      float4 p =
          V::sums(acc[i][j], j + 1 < N ? acc[i][(j + 1) % N] : none,
                  j + 2 < N ? acc[i][(j + 2) % N] : none, j + 3 < N ? acc[i][(j + 3) % N] : none);
      constexpr int width = N < 4 ? N : 4;
      float4 b = {};
      std::memcpy(&b, bias + j, width * sizeof(float));
      p += b;
      std::memcpy(out + i * kBlock + j, &p, width * sizeof(float));
    }
}

// out[i * kBlock + j] = x[i] . w[j] + bias[j], i < M, j < N.
template <class V, class P, int M, int N, bool Cold>
inline void tile(const void* const* x, const void* const* w, int64_t d, const float* bias,
                 float* out) {
  using X = typename P::x_type;
  using W = typename P::w_type;
  typename V::reg acc[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) acc[i][j] = V::set1(0.f);

  auto accumulate = [&](auto&& load, int64_t c) __attribute__((always_inline)) {
    typename P::reg b[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      b[j] = load(static_cast<const W*>(w[j]) + c);
      if (Cold) __builtin_prefetch(static_cast<const W*>(w[j + N]) + c, 0, 2);
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const typename P::reg a = load(static_cast<const X*>(x[i]) + c);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) acc[i][j] = P::mul_add(a, b[j], acc[i][j]);
    }
  };
  int64_t c = 0;
  for (; c + P::step <= d; c += P::step) accumulate([](const auto* p) { return P::load(p); }, c);
  if (const int rest = static_cast<int>(d - c))
    accumulate([rest](const auto* p) { return P::load_part(p, rest); }, c);
  store_dots<V>(acc, bias, out);
}

template <class V, class P, int M>
void panel(const void* const* x, const void* const* w, int n, int64_t d, const float* bias,
           float* out, bool cold) {
  int j = 0;
  if constexpr (M <= V::wide)
    for (; j + 8 <= n; j += 8) tile<V, P, M, 8, false>(x, w + j, d, bias + j, out + j);
  for (; j + 4 <= n; j += 4)
    if (cold)
      tile<V, P, M, 4, true>(x, w + j, d, bias + j, out + j);
    else
      tile<V, P, M, 4, false>(x, w + j, d, bias + j, out + j);
  w += j, bias += j, out += j;
  switch (n - j) {
    case 1:
      return tile<V, P, M, 1, false>(x, w, d, bias, out);
    case 2:
      return tile<V, P, M, 2, false>(x, w, d, bias, out);
    case 3:
      return tile<V, P, M, 3, false>(x, w, d, bias, out);
  }
}

template <class V, class P, int M = 1>
void dots_of(const void* const* x, int m, const void* const* w, int n, int64_t d, const float* bias,
             float* out, bool cold) {
  if (m == M) return panel<V, P, M>(x, w, n, d, bias, out, cold);
  if constexpr (M < V::tokens) dots_of<V, P, M + 1>(x, m, w, n, d, bias, out, cold);
}

template <class V>
void dots(const void* const* x, Dtype x_dtype, int m, const void* const* w, Dtype w_dtype, int n,
          int64_t d, const float* bias, float* out, bool cold) {
  if (x_dtype == Dtype::bf16)
    return dots_of<V, typename V::Bf16Product>(x, m, w, n, d, bias, out, cold);
  switch (w_dtype) {
    case Dtype::f32:
      return dots_of<V, Widened<V, float, float>>(x, m, w, n, d, bias, out, cold);
    case Dtype::bf16:
      return dots_of<V, Widened<V, float, bf16>>(x, m, w, n, d, bias, out, cold);
    case Dtype::f16:
      return dots_of<V, Widened<V, float, f16>>(x, m, w, n, d, bias, out, cold);
  }
}

template <class V, class P, int N>
void few_dots_and_add(const void* const* x, const void* const* w, int n, int64_t d,
                      const float* bias, float* out, const float* sum, void* const* y) {
  if constexpr (N > 1)
    if (n < N) return few_dots_and_add<V, P, N - 1>(x, w, n, d, bias, out, sum, y);
  using X = typename P::x_type;
  using W = typename P::w_type;
  constexpr int M = kTogether;
  typename V::reg acc[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) acc[i][j] = V::set1(0.f);

  // Elements c ... of x and y, and what they meet: the same elements of w and sum, loaded by
  // `load`.
  auto pass = [&](auto&& load, const float* sum, X* const(&to)[M], int64_t c)
                  __attribute__((always_inline)) {
                    const auto added = P::load_sum(sum);
                    typename P::reg b[N];
#pragma GCC unroll 8
                    for (int j = 0; j < N; ++j) b[j] = load(static_cast<const W*>(w[j]) + c);
#pragma GCC unroll 8
                    for (int i = 0; i < M; ++i) {
                      const typename P::reg a = load(static_cast<const X*>(x[i]) + c);
#pragma GCC unroll 8
                      for (int j = 0; j < N; ++j) acc[i][j] = P::mul_add(a, b[j], acc[i][j]);
                      P::store_added(to[i], a, added);
                    }
                  };
  int64_t c = 0;
  X* to[M];
  for (; c + P::step <= d; c += P::step) {
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) to[i] = static_cast<X*>(y[i]) + c;
    pass([](const auto* p) { return P::load(p); }, sum + c, to, c);
  }
  if (const int rest = static_cast<int>(d - c)) {
    float sums[P::step] = {};
    X rows[M][P::step];
    std::memcpy(sums, sum + c, rest * sizeof(float));
    for (int i = 0; i < M; ++i) to[i] = rows[i];
    pass([rest](const auto* p) { return P::load_part(p, rest); }, sums, to, c);
    for (int i = 0; i < M; ++i) std::memcpy(static_cast<X*>(y[i]) + c, rows[i], rest * sizeof(X));
  }
  store_dots<V>(acc, bias, out);
}

template <class V>
uint64_t beats(const float* p, int n, float threshold, bool ties) {
  const auto t = V::set1(threshold);
  uint64_t bits = 0;
  int j = 0;
  for (; j + V::lanes <= n; j += V::lanes) bits |= uint64_t{V::beats(V::load(p + j), t, ties)} << j;
  if (j < n) {
    const uint64_t valid = (uint64_t{1} << (n - j)) - 1;
    bits |= (V::beats(V::load_part(p + j, n - j), t, ties) & valid) << j;
  }
  return bits;
}

template <class V, class Y>
void store_two(Y* y, typename V::reg low, typename V::reg high) {
  if constexpr (std::is_same_v<Y, bf16> && V::Bf16Product::native) {
    V::store_two(y, low, high);
  } else {
    V::store(y, low);
    V::store(y + V::lanes, high);
  }
}

template <class V, class B, class R, class Y>
void add_of(const B* base, const void* const* rows, const float* coef, int64_t count, int64_t d,
            Y* y) {
  constexpr int U = 4;
  const bool summed = coef == nullptr && count == 1;
  auto row = [rows](int64_t i) { return static_cast<const R*>(rows[i]); };
  int64_t c = 0;
  for (; c + U * V::lanes <= d; c += U * V::lanes) {
    typename V::reg s[U];
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) s[u] = summed ? V::load(row(0) + c + u * V::lanes) : V::set1(0.f);
    for (int64_t i = summed; i < count; ++i)
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u)
        s[u] = V::fma(V::set1(coef[i]), V::load(row(i) + c + u * V::lanes), s[u]);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) s[u] = V::add(V::load(base + c + u * V::lanes), s[u]);
#pragma GCC unroll 2
    for (int u = 0; u < U; u += 2) store_two<V>(y + c + u * V::lanes, s[u], s[u + 1]);
  }
  for (; c < d; c += V::lanes) {
    const int n = static_cast<int>(d - c < V::lanes ? d - c : V::lanes);
    auto s = summed ? V::load_part(row(0) + c, n) : V::set1(0.f);
    for (int64_t i = summed; i < count; ++i)
      s = V::fma(V::set1(coef[i]), V::load_part(row(i) + c, n), s);
    V::store_part(y + c, V::add(V::load_part(base + c, n), s), n);
  }
}

// Calls f with a null pointer of the element type.
template <class F>
void with_type(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32:
      return f(static_cast<float*>(nullptr));
    case Dtype::bf16:
      return f(static_cast<bf16*>(nullptr));
    case Dtype::f16:
      return f(static_cast<f16*>(nullptr));
  }
}

template <class V>
void add(const void* base, Dtype base_dtype, const void* const* rows, Dtype rows_dtype,
         const float* coef, int64_t count, int64_t d, void* y, Dtype y_dtype) {
  with_type(y_dtype, [&](auto* y_tag) {
    with_type(rows_dtype, [&](auto* row_tag) {
      using Y = std::remove_pointer_t<decltype(y_tag)>;
      using R = std::remove_pointer_t<decltype(row_tag)>;
      if (base_dtype == y_dtype)
        add_of<V, Y, R, Y>(static_cast<const Y*>(base), rows, coef, count, d, static_cast<Y*>(y));
      else
        add_of<V, float, R, Y>(static_cast<const float*>(base), rows, coef, count, d,
                               static_cast<Y*>(y));
    });
  });
}

template <class V>
void dots_and_add(const void* const* x, Dtype x_dtype, const void* const* w, Dtype w_dtype, int n,
                  int64_t d, const float* bias, float* out, const float* sum, void* const* y) {
  if (V::Bf16Product::native && x_dtype == Dtype::bf16 && w_dtype == Dtype::bf16)
    return few_dots_and_add<V, typename V::Bf16Product, kFew>(x, w, n, d, bias, out, sum, y);
  with_type(x_dtype, [&](auto* x_tag) {
    with_type(w_dtype, [&](auto* w_tag) {
      using P = Widened<V, std::remove_pointer_t<decltype(x_tag)>,
                        std::remove_pointer_t<decltype(w_tag)>>;
      few_dots_and_add<V, P, kFew>(x, w, n, d, bias, out, sum, y);
    });
  });
}

template <class V>
void to_f32(const void* src, Dtype dtype, int64_t n, float* dst) {
  with_type(dtype, [&](auto* tag) {
    const auto* p = static_cast<const std::remove_pointer_t<decltype(tag)>*>(src);
    int64_t c = 0;
    for (; c + V::lanes <= n; c += V::lanes) V::store(dst + c, V::load(p + c));
    if (const int rest = static_cast<int>(n - c))
      V::store_part(dst + c, V::load_part(p + c, rest), rest);
  });
}

template <class V>
void copy(const void* src, int64_t bytes, void* dst) {
  constexpr int64_t kStep = sizeof(typename V::reg);
  const auto* from = static_cast<const char*>(src);
  auto* to = static_cast<char*>(dst);
  for (; bytes >= kStep; bytes -= kStep, from += kStep, to += kStep)
    V::store(reinterpret_cast<float*>(to), V::load(reinterpret_cast<const float*>(from)));
  std::memcpy(to, from, bytes);
}

template <class V>
constexpr Kernels table{
    V::tokens, V::Bf16Product::native, dots<V>, dots_and_add<V>, beats<V>, add<V>, to_f32<V>,
    copy<V>};

}  // namespace
}  // namespace saesteer::cpu
