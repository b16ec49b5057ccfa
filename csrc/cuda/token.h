// What one block does with one token: dot products with a few rows, and a sum of a few rows.
#pragma once

#include <type_traits>

#include "elements.h"

namespace saesteer::cuda {

constexpr int kTokenThreads = 128;  // three chunks each of a row of 3,072

// Sums kCount numbers a thread over the block. Every thread gets every sum; the order of additions
// is fixed. `scratch` holds kTokenThreads / 32 * kCount floats and is read until the next barrier.
template <int kCount>
__device__ void sum_over_block(float (&v)[kCount], float* scratch) {
  constexpr int kWarps = kTokenThreads / 32;
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    for (int lanes = 16; lanes; lanes /= 2) v[i] += shuffle_xor(v[i], lanes);
  if (threadIdx.x % 32 == 0)
    for (int i = 0; i < kCount; ++i) scratch[threadIdx.x / 32 * kCount + i] = v[i];
  sync_threads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    v[i] = scratch[i];
    for (int warp = 1; warp < kWarps; ++warp) v[i] += scratch[warp * kCount + i];
  }
}

constexpr int kRowsAtOnce = 4;  // for one reading of x; by estimate
constexpr int kTokenScratch = kTokenThreads / 32 * kRowsAtOnce;

// Chunks of x and of each row that a thread has under way at once, as far as registers allow.
template <bool kWhole, int kCount>
constexpr int kDotChunks = kWhole && kCount == 1 ? 3 : 1;

// p[i] = rows[index[i]] . x + bias[index[i]] for kCount rows; NaN where the index is not below
// `limit`. `index` may be null: 0, 1, ... Whether one of them is undecided.
template <bool kWhole, int kCount>
__device__ __forceinline__ bool project_some(const void* x, Dtype dtype, const Rows& rows,
                                             const float* bias, int64_t limit, const int64_t* index,
                                             int64_t first, float* p, float* scratch) {
  const int mine = threadIdx.x;
  const auto named = [&](int i) { return index ? index[first + i] : first + i; };
  const auto there = [&](int64_t i) {
    return static_cast<uint64_t>(i) < static_cast<uint64_t>(limit);
  };
  int64_t at[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) at[i] = named(i);
  // Thread i < kCount will write p[first + i]: its bias is on its way while the sums are made.
  const int64_t own = mine < kCount ? named(mine) : -1;

  float sum[kCount] = {};
  const float offset = there(own) ? bias[own] : not_a_number();
  const void* row[kCount];
  bool wide[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    row[i] = rows[there(at[i]) ? at[i] : 0];
    wide[i] = aligned(row[i]);
  }
  const bool x_wide = aligned(x);
#pragma unroll(kDotChunks<kWhole, kCount>)
  for (int64_t c = threadIdx.x; c < chunks(rows.width); c += kTokenThreads) {
    float a[kChunk], b[kChunk];
    load8<kWhole>(x, dtype, rows.width, c, x_wide, a);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      load8<kWhole>(row[i], rows.dtype, rows.width, c, wide[i], b);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) sum[i] = fmaf(a[e], b[e], sum[i]);
    }
  }
  sum_over_block(sum, scratch);
  bool open = false;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (mine != i) continue;  // sum[mine] would be local memory
    p[first + i] = sum[i] + offset;
    open = undecided(sum[i] + offset);
  }
  return sync_threads_or(open);
}

template <bool kWhole>
__device__ __forceinline__ bool project_all(const void* x, Dtype dtype, const Rows& rows,
                                            const float* bias, int64_t limit, const int64_t* index,
                                            int64_t count, float* p, float* scratch) {
  bool open = false;
  int64_t i = 0;
  if constexpr (kWhole)
    for (; i + kRowsAtOnce <= count; i += kRowsAtOnce)
      open |= project_some<true, kRowsAtOnce>(x, dtype, rows, bias, limit, index, i, p, scratch);
  for (; i < count; ++i)
    open |= project_some<kWhole, 1>(x, dtype, rows, bias, limit, index, i, p, scratch);
  return open;
}

// p[i] for i < count, and whether one of them is undecided; kTokenScratch floats of scratch. The
// sum of a row depends neither on its place nor on the other rows.
__device__ __forceinline__ bool project_token(const void* x, Dtype dtype, const Rows& rows,
                                              const float* bias, int64_t limit,
                                              const int64_t* index, int64_t count, float* p,
                                              float* scratch) {
  return whole(rows) && aligned(x)
             ? project_all<true>(x, dtype, rows, bias, limit, index, count, p, scratch)
             : project_all<false>(x, dtype, rows, bias, limit, index, count, p, scratch);
}

// The same for a sum of rows; of unknown dtypes they take more registers.
template <int kDtype>
constexpr int kAddChunks = kDtype < 0 ? 1 : 3;

// Of kCount chunks, kTokenThreads apart.
template <bool kWhole, int kCount>
__device__ __forceinline__ void add_some(const void* x, const Rows& rows, int64_t count,
                                         const float* coef, void* y, Dtype dtype, int64_t first,
                                         bool x_wide, bool y_wide) {
  float sum[kCount][kChunk], v[kCount][kChunk];
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    load8<kWhole>(x, dtype, rows.width, first + j * kTokenThreads, x_wide, sum[j]);
#pragma unroll 1
  for (int64_t i = 0; i < count; ++i) {
    const float term = coef[i];
    if (term == 0) continue;
    const void* const row = rows[i];
    const bool wide = aligned(row);
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      load8<kWhole>(row, rows.dtype, rows.width, first + j * kTokenThreads, wide, v[j]);
#pragma unroll
    for (int j = 0; j < kCount; ++j)
#pragma unroll
      for (int e = 0; e < kChunk; ++e) sum[j][e] = fmaf(term, v[j][e], sum[j][e]);
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    store8<kWhole>(y, dtype, rows.width, first + j * kTokenThreads, y_wide, sum[j]);
}

template <bool kWhole, int kCount>
__device__ __forceinline__ void add_all(const void* x, const Rows& rows, int64_t count,
                                        const float* coef, void* y, Dtype dtype) {
  const bool x_wide = aligned(x), y_wide = aligned(y);
  const int64_t all = chunks(rows.width);
  int64_t c = threadIdx.x;
  if constexpr (kCount > 1)
#pragma unroll 1
    for (; c + (kCount - 1) * kTokenThreads < all; c += kCount * kTokenThreads)
      add_some<kWhole, kCount>(x, rows, count, coef, y, dtype, c, x_wide, y_wide);
#pragma unroll 1
  for (; c < all; c += kTokenThreads)
    add_some<kWhole, 1>(x, rows, count, coef, y, dtype, c, x_wide, y_wide);
}

// y = x + sum_i coef[i] rows[i] over the coefficients that are not 0; if all are, the bits of x.
// coef[i] may be in shared memory, written by thread i % kTokenThreads just before. x's second
// reading finds it in the first-level cache.
template <int kDtype>
__device__ __forceinline__ void add_to_token(const void* x, const Rows& rows, int64_t count,
                                             const float* coef, void* y, Dtype dtype) {
  bool any = false;
  for (int64_t i = threadIdx.x; i < count; i += kTokenThreads) any |= coef[i] != 0;
  if (!sync_threads_or(any))
    return copy_row(x, y, rows.width * bytes(dtype), threadIdx.x, kTokenThreads);
  if (whole(rows) && aligned(x) && aligned(y))
    add_all<true, kAddChunks<kDtype>>(x, rows, count, coef, y, dtype);
  else
    add_all<false, 1>(x, rows, count, coef, y, dtype);
}

// Runs `make` with the kernel's variant: the dtype, if x and every matrix have it, else -1.
template <class F>
void for_dtypes(Dtype x, Dtype a, Dtype b, const F& make) {
  if (x != a || x != b) return make(std::integral_constant<int, -1>());
  switch (x) {
    case Dtype::f32:
      return make(std::integral_constant<int, static_cast<int>(Dtype::f32)>());
    case Dtype::bf16:
      return make(std::integral_constant<int, static_cast<int>(Dtype::bf16)>());
    case Dtype::f16:
      return make(std::integral_constant<int, static_cast<int>(Dtype::f16)>());
  }
}

// Makes a variant's dtypes constants.
template <int kDtype, class... Matrix>
__device__ __forceinline__ void fix_dtypes(Matrix&... matrix) {
  if constexpr (kDtype >= 0) ((matrix.dtype = static_cast<Dtype>(kDtype)), ...);
}

// Calls work(first, count) for all of 0 ... tokens - 1, at most `most` at a time.
template <class F>
void in_pieces(int64_t tokens, int64_t most, const F& work) {
  for (int64_t first = 0; first < tokens; first += most)
    work(first, tokens - first < most ? tokens - first : most);
}

constexpr int64_t kMostBlocks = int64_t{1} << 30;  // of a launch, which may have 2^31 - 1

inline Rows from(const Rows& x, int64_t first) { return {x[first], x.dtype, x.width}; }
inline OutRows from(const OutRows& y, int64_t first) { return {y[first], y.dtype, y.width}; }

}  // namespace saesteer::cuda
