// Elements of the three dtypes, eight at a time: 16 bytes a load or store of a 16-bit dtype.
//
// A row is cut into chunks of eight whatever its alignment, so that sums over it do not depend on
// where it lies. Where `dtype` is a constant, the switches vanish.
#pragma once

#include "ptx.h"
#include "rank.h"

namespace saesteer::cuda {

constexpr int kChunk = 8;

__device__ inline float to_f32(float v) { return v; }
__device__ inline float to_f32(bf16 v) { return float_of(uint32_t{v.bits} << 16); }
__device__ inline float to_f32(f16 v) { return f16_to_f32(v.bits); }

__device__ inline void from_f32(float v, float& out) { out = v; }
__device__ inline void from_f32(float v, bf16& out) { out.bits = f32_to_bf16(v); }
__device__ inline void from_f32(float v, f16& out) { out.bits = f32_to_f16(v); }

__device__ inline bool aligned(const void* row) {
  return reinterpret_cast<uintptr_t>(row) % sizeof(uint4) == 0;
}

// Chunks of a row of `width` elements.
__device__ inline int64_t chunks(int64_t width) { return (width + kChunk - 1) / kChunk; }

template <class T>
__device__ __forceinline__ void load_as(const T* at, int n, bool wide, float (&v)[kChunk]) {
  if (wide && n == kChunk) {
    uint4 words[sizeof(T) * kChunk / sizeof(uint4)];
    T elements[kChunk];
    for (size_t i = 0; i < sizeof words / sizeof(uint4); ++i)
      words[i] = reinterpret_cast<const uint4*>(at)[i];
    memcpy(elements, words, sizeof words);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v[i] = to_f32(elements[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v[i] = i < n ? to_f32(at[i]) : 0.f;
  }
}

template <class T>
__device__ __forceinline__ void store_as(T* at, int n, bool wide, const float (&v)[kChunk]) {
  T elements[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) from_f32(v[i], elements[i]);
  if (wide && n == kChunk) {
    uint4 words[sizeof(T) * kChunk / sizeof(uint4)];
    memcpy(words, elements, sizeof words);
    for (size_t i = 0; i < sizeof words / sizeof(uint4); ++i)
      reinterpret_cast<uint4*>(at)[i] = words[i];
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (i < n) at[i] = elements[i];
  }
}

__device__ inline int left(int64_t width, int64_t chunk) {
  const int64_t n = width - chunk * kChunk;
  return n < kChunk ? static_cast<int>(n) : kChunk;
}

// Whether every row is aligned and made of whole chunks.
__device__ inline bool whole(const Rows& rows) {
  return aligned(rows.data) && rows.width % kChunk == 0;
}

// Chunk number `chunk` of a row, zeros beyond its width. `wide` says that the row is aligned,
// kWhole that all are whole: then no branch keeps several loads from being under way.
template <bool kWhole = false>
__device__ __forceinline__ void load8(const void* row, Dtype dtype, int64_t width, int64_t chunk,
                                      bool wide, float (&v)[kChunk]) {
  const int n = kWhole ? kChunk : left(width, chunk);
  wide |= kWhole;
  const int64_t at = chunk * kChunk;
  switch (dtype) {
    case Dtype::f32:
      return load_as(static_cast<const float*>(row) + at, n, wide, v);
    case Dtype::bf16:
      return load_as(static_cast<const bf16*>(row) + at, n, wide, v);
    case Dtype::f16:
      return load_as(static_cast<const f16*>(row) + at, n, wide, v);
  }
}

template <bool kWhole = false>
__device__ __forceinline__ void store8(void* row, Dtype dtype, int64_t width, int64_t chunk,
                                       bool wide, const float (&v)[kChunk]) {
  const int n = kWhole ? kChunk : left(width, chunk);
  wide |= kWhole;
  const int64_t at = chunk * kChunk;
  switch (dtype) {
    case Dtype::f32:
      return store_as(static_cast<float*>(row) + at, n, wide, v);
    case Dtype::bf16:
      return store_as(static_cast<bf16*>(row) + at, n, wide, v);
    case Dtype::f16:
      return store_as(static_cast<f16*>(row) + at, n, wide, v);
  }
}

// A row bit for bit, by `threads` threads; nothing if it is its own copy.
__device__ inline void copy_row(const void* from, void* to, int64_t bytes, int thread,
                                int threads) {
  if (from == to) return;
  int64_t done = 0;
  if (aligned(from) && aligned(to)) {
    const int64_t words = bytes / static_cast<int64_t>(sizeof(uint4));
    for (int64_t i = thread; i < words; i += threads)
      static_cast<uint4*>(to)[i] = static_cast<const uint4*>(from)[i];
    done = words * static_cast<int64_t>(sizeof(uint4));
  }
  for (int64_t i = done / 2 + thread; i < bytes / 2; i += threads)
    static_cast<uint16_t*>(to)[i] = static_cast<const uint16_t*>(from)[i];
}

}  // namespace saesteer::cuda
