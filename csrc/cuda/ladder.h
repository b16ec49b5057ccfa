// What the ladder's kernels do with a token before the scan (scan.h) and after it, a block a token.
#pragma once

#include "scan.h"
#include "token.h"

namespace saesteer::cuda {

// The tokens that L0 leaves open, in device memory.
struct Open {
  int32_t* count;   // null: few tokens, each with its own slot, so that nothing has to be zeroed
  int32_t* token;   // by slot; -1: settled
  float* p;         // [token, F]
  int32_t* beaten;  // [token, F]
};

struct Ladder {
  Rows x;
  int64_t tokens;
  Encoder encoder;
  Features features;
  Open open;
  // feature_acts
  float* acts;
  // steer
  Rows directions;
  Values values;
  const bool* mask;
  OutRows y;  // may be x: a row is written by the block that reads it last, after the scan of it
};

// Shared memory of the functions below: F floats, then scratch.
SAESTEER_HD inline int64_t level0_bytes(int64_t features) { return (features + kTokenScratch) * 4; }

__device__ inline bool is_masked(const Ladder& c, int64_t token) {
  return c.mask && !c.mask[token];
}

__device__ inline float value_of(const Ladder& c, int64_t token, int64_t f) {
  return c.values.data[token * c.values.stride + f];
}

// The value of this thread's first feature: loaded before p is measured, it is there afterwards.
__device__ inline float first_value(const Ladder& c, int64_t token) {
  return c.acts || threadIdx.x >= c.features.count ? 0.f : value_of(c, token, threadIdx.x);
}

// In the token's own slot, or, where open tokens are counted, in the next free one.
__device__ inline void record_open(const Open& open, int64_t token, bool is_open) {
  if (threadIdx.x) return;
  if (!open.count)
    open.token[token] = is_open ? static_cast<int32_t>(token) : -1;
  else if (is_open)
    open.token[atomic_add(open.count, 1)] = static_cast<int32_t>(token);
}

// p of an unmasked token, in shared memory, and whether the scan has to settle it.
__device__ __forceinline__ bool measure(const Ladder& c, int64_t token) {
  if (is_masked(c, token)) return false;
  float* const p = shared<float>();
  const bool open =
      project_token(c.x[token], c.x.dtype, c.encoder.W, c.encoder.bias, c.encoder.count,
                    c.features.index, c.features.count, p, p + c.features.count);
  return open && c.encoder.k < c.encoder.count;  // with k = N no rank is too low
}

// Of a measured token: what the scan needs, if it is open; else what is known of it.
template <int kDtype>
__device__ __forceinline__ void keep_and_write(const Ladder& c, int64_t token, bool open,
                                               const Rows& directions, float value) {
  const int64_t F = c.features.count;
  const void* x = c.x[token];
  record_open(c.open, token, open);
  if (is_masked(c, token))
    return copy_row(x, c.y[token], c.x.width * bytes(c.x.dtype), threadIdx.x, kTokenThreads);

  float* const p = shared<float>();
  for (int64_t f = threadIdx.x; f < F; f += kTokenThreads) {
    const int64_t at = token * F + f;
    if (open) {
      c.open.p[at] = p[f];
      // To the scan a feature that k latents beat is decided, whatever its p.
      c.open.beaten[at] = undecided(p[f]) ? 0 : static_cast<int32_t>(c.encoder.k);
    }
    if (c.acts) c.acts[at] = unbeaten(p[f]);
  }
  if (open || c.acts) return;

  for (int64_t f = threadIdx.x; f < F; f += kTokenThreads)
    p[f] = (f == threadIdx.x ? value : value_of(c, token, f)) - unbeaten(p[f]);
  add_to_token<kDtype>(x, directions, F, p, c.y[token], c.x.dtype);
}

// For the open tokens, shared out among the blocks: what the scan found.
template <int kDtype>
__device__ __forceinline__ void settle_tokens(const Ladder& c) {
  const int64_t F = c.features.count, slots = c.open.count ? *c.open.count : c.tokens;
  float* const delta = shared<float>();
  for (int64_t slot = blockIdx.x; slot < slots; slot += gridDim.x) {
    const int64_t token = c.open.token[slot];
    if (token < 0) continue;
    for (int64_t f = threadIdx.x; f < F; f += kTokenThreads) {
      const int64_t at = token * F + f;
      const float a = settled(c.open.p[at], c.open.beaten[at], c.encoder.k);
      if (c.acts)
        c.acts[at] = a;
      else
        delta[f] = value_of(c, token, f) - a;
    }
    if (c.acts) continue;
    add_to_token<kDtype>(c.x[token], c.directions, F, delta, c.y[token], c.x.dtype);
    sync_threads();  // before the next token's delta
  }
}

// All of the ladder in one launch; false if these tokens need the launches one by one.
bool climb_once(const Ladder& c, const Scan& s, Dtype directions, Stream stream);

}  // namespace saesteer::cuda
