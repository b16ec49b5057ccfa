// encode: the preactivations of as many tokens as the second-level cache holds, then the k best of
// each, and so on for the next tokens. decode: a sum of k rows.
#include <algorithm>

#include "kernels.h"
#include "scan.h"
#include "token.h"

namespace saesteer::cuda {
namespace {

constexpr int kThreads = 256, kBins = 256;
constexpr int64_t kPreactBytes = int64_t{24} << 20;

struct Select {
  const float* preacts;  // [token, N]
  int64_t N, k;
  uint64_t* keys;  // [token, k]: the k largest, in no order
  float* values;
  int64_t* indices;
};

constexpr int kCandidates = 1024;

struct Found {
  uint64_t highest[kThreads];  // each thread's
  uint64_t candidates[kCandidates];
  int bins[kBins];
  int bin, above, kept;
};

// A key that at least k keys reach: the k-th of the threads' highest ones. 0 if there are fewer.
__device__ uint64_t lower_bound(const float* p, int64_t N, int64_t k, Found& found) {
  uint64_t mine = 0;
  for (int64_t j = threadIdx.x; j < N; j += kThreads) {
    const uint64_t key = key_of(p[j], static_cast<uint32_t>(j));
    mine = key > mine ? key : mine;
  }
  found.highest[threadIdx.x] = mine;
  if (threadIdx.x == 0) found.candidates[0] = 0;
  sync_threads();
  int64_t rank = 1;
  for (int i = 0; i < kThreads; ++i) rank += found.highest[i] > mine;
  if (rank == k) found.candidates[0] = mine;
  sync_threads();
  const uint64_t bound = found.candidates[0];
  sync_threads();
  return bound;
}

// The k-th largest of `count` distinct keys, digit by digit from the highest, or a number between
// it and the next.
template <class Key>
__device__ uint64_t kth_largest(const Key& key, int64_t count, int64_t k, Found& found) {
  uint64_t prefix = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    for (int b = threadIdx.x; b < kBins; b += kThreads) found.bins[b] = 0;
    sync_threads();
    for (int64_t i = threadIdx.x; i < count; i += kThreads)
      if (shift == 56 || (key(i) ^ prefix) >> (shift + 8) == 0)
        atomic_add(&found.bins[key(i) >> shift & 255], 1);
    sync_threads();
    if (threadIdx.x == 0) {
      int64_t above = 0;
      int b = kBins - 1;
      while (above + found.bins[b] < k) above += found.bins[b--];
      found.bin = b, found.above = static_cast<int>(above);
    }
    sync_threads();
    prefix |= static_cast<uint64_t>(found.bin) << shift;
    k -= found.above;
    const bool whole = found.bins[found.bin] == k;
    sync_threads();
    if (whole) break;
  }
  return prefix;
}

// How many keys are at least `least`; the first of them to come are kept in `keys`.
template <class Key>
__device__ int gather(const Key& key, int64_t count, uint64_t least, uint64_t* keys, int room,
                      Found& found) {
  if (threadIdx.x == 0) found.kept = 0;
  sync_threads();
  for (int64_t i = threadIdx.x; i < count; i += kThreads)
    if (key(i) >= least) {
      const int at = atomic_add(&found.kept, 1);
      if (at < room) keys[at] = key(i);
    }
  sync_threads();
  const int kept = found.kept;
  sync_threads();
  return kept;
}

__global__ void __launch_bounds__(kThreads) select(Select c) {
  Found& found = *shared<Found>();
  const int64_t token = blockIdx.x;
  const float* p = c.preacts + token * c.N;
  uint64_t* keys = c.keys + token * c.k;
  const int k = static_cast<int>(c.k);

  // Few keys reach the bound, unless the tokens' largest are far from evenly spread
  const auto any = [p](int64_t j) { return key_of(p[j], static_cast<uint32_t>(j)); };
  const auto candidate = [&found](int64_t i) { return found.candidates[i]; };
  const uint64_t bound = lower_bound(p, c.N, k, found);
  const int candidates = gather(any, c.N, bound, found.candidates, kCandidates, found);
  if (candidates <= kCandidates)
    gather(candidate, candidates, kth_largest(candidate, candidates, k, found), keys, k, found);
  else
    gather(any, c.N, kth_largest(any, c.N, k, found), keys, k, found);

  // Put each where its rank says
  for (int i = threadIdx.x; i < k; i += kThreads) {
    const float p = preact_of(keys[i]);
    int rank = 0;
    for (int other = 0; other < k; ++other) rank += keys[other] > keys[i];
    c.values[token * c.k + rank] = p < 0 ? 0.f : p;
    c.indices[token * c.k + rank] = index_of(keys[i]);
  }
}

struct Decode {
  const float* values;
  const int64_t* indices;
  int64_t k;
  Rows W_dec;
  int64_t latents;
  const float* b_dec;
  OutRows y;
};

template <int kDtype>
__global__ void __launch_bounds__(kTokenThreads) decode_token(Decode c) {
  fix_dtypes<kDtype>(c.W_dec, c.y);
  const int64_t token = blockIdx.x, d = c.W_dec.width;
  const float* values = c.values + token * c.k;
  const int64_t* indices = c.indices + token * c.k;
  void* y = c.y[token];
  const bool b_wide = aligned(c.b_dec), y_wide = aligned(y);
  for (int64_t chunk = threadIdx.x; chunk < chunks(d); chunk += kTokenThreads) {
    float sum[kChunk], v[kChunk];
    load8(c.b_dec, Dtype::f32, d, chunk, b_wide, sum);
#pragma unroll 4
    for (int64_t i = 0; i < c.k; ++i) {
      const float value = values[i];
      if (value == 0) continue;
      const int64_t index = indices[i];
      const bool there = index >= 0 && index < c.latents;
      if (there) load8(c.W_dec[index], c.W_dec.dtype, d, chunk, aligned(c.W_dec[index]), v);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) sum[e] = there ? fmaf(value, v[e], sum[e]) : not_a_number();
    }
    store8(y, c.y.dtype, d, chunk, y_wide, sum);
  }
}

int64_t tokens_at_once(int64_t tokens, const Encoder& encoder) {
  return std::min(tokens, std::max<int64_t>(64, kPreactBytes / (4 * encoder.count)));
}

int64_t keys_bytes(int64_t tokens, const Encoder& encoder) { return 8 * tokens * encoder.k; }

}  // namespace

int64_t encode_workspace(int64_t tokens, const Encoder& encoder) {
  const int64_t some = tokens_at_once(tokens, encoder);
  return keys_bytes(some, encoder) + 4 * some * encoder.count;
}

void encode(const Rows& x, int64_t tokens, const Encoder& encoder, float* values, int64_t* indices,
            void* workspace, void* stream) {
  const int64_t N = encoder.count, k = encoder.k, most = tokens_at_once(tokens, encoder);
  auto* keys = static_cast<uint64_t*>(workspace);
  auto* preacts =
      reinterpret_cast<float*>(static_cast<char*>(workspace) + keys_bytes(most, encoder));
  in_pieces(tokens, most, [&](int64_t first, int64_t count) {
    Scan s{};
    s.x = from(x, first), s.encoder = encoder, s.slots = count, s.preacts = preacts;
    scan(s, static_cast<Stream>(stream));
    launch(select, {count, kThreads, sizeof(Found)}, static_cast<Stream>(stream),
           Select{preacts, N, k, keys, values + first * k, indices + first * k});
  });
}

void decode(const float* values, const int64_t* indices, int64_t tokens, int64_t k,
            const Rows& W_dec, int64_t latents, const float* b_dec, const OutRows& y,
            void* stream) {
  for_dtypes(W_dec.dtype, W_dec.dtype, y.dtype, [&](auto dtype) {
    in_pieces(tokens, kMostBlocks, [&](int64_t first, int64_t some) {
      launch(decode_token<dtype()>, {some, kTokenThreads}, static_cast<Stream>(stream),
             Decode{values + first * k, indices + first * k, k, W_dec, latents, b_dec,
                    from(y, first)});
    });
  });
}

}  // namespace saesteer::cuda
