// The inner loops, written once over a vector type V; each kernels_*.cpp brings its own V and
// instantiates `table<V>`. V has
//
//   reg, lanes             a register of fp32; how many it holds
//   tokens                 the most rows of x that a tile takes
//   wide                   the most rows of x beside which a tile takes 8 rows of w
//   load(p)                of float, bf16 or f16, as fp32
//   load_part(p, n)        the first n <= lanes; zeros in the other lanes
//   store(p, v)            to float, bf16 or f16, rounded to nearest even
//   store_part(p, v, n)    the first n <= lanes
//   set1, add, fma         a number in every lane; a + b; a * b + c
//   sums(a, b, c, d)       the sum of each register's lanes: a float4
//   beats(p, t, ties)      Kernels::beats, a bit a lane
//   Bf16Product            how two bf16 rows are multiplied: Widened, or the machine's own way
//   store_two(p, u, v)     two stores in one to bf16, where Bf16Product::native
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
  if constexpr (M <= V::wide) {
    for (; j + 8 <= n; j += 8)
      if (cold)
        tile<V, P, M, 8, true>(x, w + j, d, bias + j, out + j);
      else
        tile<V, P, M, 8, false>(x, w + j, d, bias + j, out + j);
  }
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

// Kernels::dots_and_add for one type of x and of w, and at most N rows.
template <class V, class P, int N>
void few_dots_and_add(const void* const* x, const void* const* w, int n, int64_t d,
                      const float* bias, float* out, const float* sum, void* const* y) {
  if constexpr (N > 1)
    if (n < N) return few_dots_and_add<V, P, N - 1>(x, w, n, d, bias, out, sum, y);
  using X = typename P::x_type;
  using W = typename P::w_type;
  constexpr int M = kFusedTokens;
  typename V::reg acc[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) acc[i][j] = V::set1(0.f);

  const X* from[M];
  X* to[M];
  const W* row[N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) from[i] = static_cast<const X*>(x[i]), to[i] = static_cast<X*>(y[i]);
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) row[j] = static_cast<const W*>(w[j]);

  // The elements from c on; s is sum there. All of x is loaded before any of y is stored: a store
  // holds up loads whose addresses end in the same 12 bits, as those of x and y often do.
  auto pass = [&](auto load, auto store, int64_t c, const float* s) __attribute__((always_inline)) {
    const auto added = P::load_sum(s);
    typename P::reg a[M], b[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) b[j] = load(row[j] + c);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) a[i] = load(from[i] + c);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) acc[i][j] = P::mul_add(a[i], b[j], acc[i][j]);
      store(to[i] + c, a[i], added);
    }
  };
  int64_t c = 0;
  for (; c + P::step <= d; c += P::step)
    pass([](const auto* p) { return P::load(p); },
         [](X* p, auto a, auto added) { P::store_added(p, a, added); }, c, sum + c);
  if (const int rest = static_cast<int>(d - c)) {
    float part[P::step] = {};
    std::memcpy(part, sum + c, rest * sizeof(float));
    pass([rest](const auto* p) { return P::load_part(p, rest); },
         [rest](X* p, auto a, auto added) {
           X whole[P::step];
           P::store_added(whole, a, added);
           std::memcpy(p, whole, rest * sizeof(X));
         },
         c, part);
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

// Found bit by bit, from the first in which the keys differ.
inline uint64_t bound(const uint64_t* keys, int64_t n, int64_t k) {
  uint64_t all = ~uint64_t{0}, any = 0;
  for (int64_t i = 0; i < n; ++i) all &= keys[i], any |= keys[i];
  if (all == any) return all;
  uint64_t bit = uint64_t{1} << (63 - __builtin_clzll(all ^ any));
  uint64_t found = all & ~(2 * bit - 1);
  for (int64_t reach = n; reach != k; bit >>= 1) {
    const uint64_t higher = found | bit;
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += keys[i] >= higher;
    if (count >= k) found = higher, reach = count;
  }
  return found;
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

// y = base + (sum + sum_i coef[i] rows[i]), the rows from column `at` on. A null `sum` is -0, which
// changes no sign; with B = void there is no base.
template <class V, class B, class R, class Y>
void add_few(const B* base, const float* sum, const void* const* rows, const float* coef,
             int64_t count, int64_t at, int64_t d, Y* y) {
  constexpr int U = 4;
  auto row = [rows, at](int64_t i) { return static_cast<const R*>(rows[i]) + at; };
  int64_t c = 0;
  for (; c + U * V::lanes <= d; c += U * V::lanes) {
    typename V::reg s[U];
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) s[u] = sum ? V::load(sum + c + u * V::lanes) : V::set1(-0.f);
    for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u)
        s[u] = V::fma(V::set1(coef[i]), V::load(row(i) + c + u * V::lanes), s[u]);
    if constexpr (!std::is_void_v<B>)
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) s[u] = V::add(V::load(base + c + u * V::lanes), s[u]);
#pragma GCC unroll 2
    for (int u = 0; u < U; u += 2) store_two<V>(y + c + u * V::lanes, s[u], s[u + 1]);
  }
  for (; c < d; c += V::lanes) {
    const int n = static_cast<int>(d - c < V::lanes ? d - c : V::lanes);
    auto s = sum ? V::load_part(sum + c, n) : V::set1(-0.f);
    for (int64_t i = 0; i < count; ++i)
      s = V::fma(V::set1(coef[i]), V::load_part(row(i) + c, n), s);
    if constexpr (!std::is_void_v<B>) s = V::add(V::load_part(base + c, n), s);
    V::store_part(y + c, s, n);
  }
}

// Many rows are added a few at a time, over columns whose sums stay in L1: more of them are more
// streams than a core reads ahead, and more lines a whole number of pages apart than L1 has ways.
template <class V, class B, class R, class Y>
void add_of(const B* base, const float* sum, const void* const* rows, const float* coef,
            int64_t count, int64_t d, Y* y) {
  constexpr int64_t kRows = 12, kMostRows = 16, kColumns = 4096;
  if (count <= kMostRows) return add_few<V, B, R>(base, sum, rows, coef, count, 0, d, y);
  alignas(64) float sums[kColumns];
  for (int64_t c = 0; c < d; c += kColumns) {
    const int64_t n = d - c < kColumns ? d - c : kColumns;
    const float* before = nullptr;
    int64_t i = 0;
    for (; count - i > kMostRows; i += kRows, before = sums)
      add_few<V, void, R>(nullptr, before, rows + i, coef + i, kRows, c, n, sums);
    add_few<V, B, R>(base + c, before, rows + i, coef + i, count - i, c, n, y + c);
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
void add(const void* base, Dtype base_dtype, const float* sum, const void* const* rows,
         Dtype rows_dtype, const float* coef, int64_t count, int64_t d, void* y, Dtype y_dtype) {
  with_type(y_dtype, [&](auto* y_tag) {
    with_type(rows_dtype, [&](auto* row_tag) {
      using Y = std::remove_pointer_t<decltype(y_tag)>;
      using R = std::remove_pointer_t<decltype(row_tag)>;
      if (base_dtype == y_dtype)
        add_of<V, Y, R>(static_cast<const Y*>(base), sum, rows, coef, count, d, static_cast<Y*>(y));
      else
        add_of<V, float, R>(static_cast<const float*>(base), sum, rows, coef, count, d,
                            static_cast<Y*>(y));
    });
  });
}

template <class V>
void dots_and_add(const void* const* x, Dtype x_dtype, const void* const* w, Dtype w_dtype, int n,
                  int64_t d, const float* bias, float* out, const float* sum, void* const* y) {
  if (V::Bf16Product::native && x_dtype == Dtype::bf16 && w_dtype == Dtype::bf16)
    return few_dots_and_add<V, typename V::Bf16Product, kFusedRows>(x, w, n, d, bias, out, sum, y);
  with_type(x_dtype, [&](auto* x_tag) {
    with_type(w_dtype, [&](auto* w_tag) {
      using P = Widened<V, std::remove_pointer_t<decltype(x_tag)>,
                        std::remove_pointer_t<decltype(w_tag)>>;
      few_dots_and_add<V, P, kFusedRows>(x, w, n, d, bias, out, sum, y);
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

inline void copy(const void* src, int64_t bytes, void* dst) {
  constexpr int64_t kLine = 64;
  const auto* from = static_cast<const char*>(src);
  auto* to = static_cast<char*>(dst);
  for (; bytes >= kLine; bytes -= kLine, from += kLine, to += kLine) std::memcpy(to, from, kLine);
  std::memcpy(to, from, bytes);
}

template <class V>
constexpr Kernels table{
    V::tokens, V::Bf16Product::native, dots<V>, dots_and_add<V>, beats<V>, bound, add<V>, to_f32<V>,
    copy};

}  // namespace
}  // namespace saesteer::cpu
