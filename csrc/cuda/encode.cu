// encode: the preactivations of some tokens, then the k best of each, and so on for the next
// tokens. decode: a sum of k rows.
#include <algorithm>

#include "kernels.h"
#include "scan.h"
#include "token.h"

namespace saesteer::cuda {
namespace {

constexpr int kMostThreads = 512, kBins = 256;

struct Select {
  const float* preacts;  // [token, preact_pitch(N)]
  int64_t N, k;
  uint64_t* keys;  // [token, k]: the k largest, in no order, of tokens with too many candidates
  float* values;
  int64_t* indices;
};

struct Found {
  uint64_t candidates[2 * kMostThreads];
  uint32_t shares[kMostThreads];  // those that have some, by their threads
  int bins[kBins];
  int bin, above, with_some, kept;
};

// One token's preactivations. They are read by fours, of which each thread has a share.
struct Row {
  const float* p;
  uint32_t N;

  __device__ uint32_t fours() const { return (N + 3) / 4; }
  __device__ float4 four(uint32_t i) const { return reinterpret_cast<const float4*>(p)[i]; }

  // take(j, p[j]) for the latents of a four that there are.
  template <class Take>
  __device__ __forceinline__ void each(const float4& v, uint32_t i, const Take& take) const {
    const uint32_t j = 4 * i;
    if (j < N) take(j, v.x);
    if (j + 1 < N) take(j + 1, v.y);
    if (j + 2 < N) take(j + 2, v.z);
    if (j + 3 < N) take(j + 3, v.w);
  }
  // The same for this thread's share; kTogether fours are under way at once.
  template <int kTogether, class Take>
  __device__ __forceinline__ void share(const Take& take) const {
    const uint32_t threads = blockDim.x;
    for (uint32_t first = threadIdx.x; first < fours(); first += kTogether * threads) {
      float4 v[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        if (first + i * threads < fours()) v[i] = four(first + i * threads);
#pragma unroll
      for (int i = 0; i < kTogether; ++i) each(v[i], first + i * threads, take);
    }
  }
};

// What k keys reach, or more: k of the threads' largest p do. To a bf16's precision, which lets in
// few more. 0 if the threads are fewer.
__device__ __forceinline__ uint64_t lower_bound(float largest, int k) {
  const uint64_t own = key_of(largest, 0);
  uint64_t bound = 0;
  for (int bit = 63; bit >= 48; --bit) {
    const uint64_t higher = bound | uint64_t{1} << bit;
    if (sync_threads_count(own >= higher) >= k) bound = higher;
  }
  return bound;
}

__device__ __forceinline__ void keep(uint64_t key, uint64_t* keys, int room, Found& found) {
  const int at = atomic_add(&found.kept, 1);
  if (at < room) keys[at] = key;
}

// How many keys reach the bound; those for which there is room become candidates. All threads look
// through the few shares that have some.
__device__ __forceinline__ int gather(const Row& row, float largest, uint64_t bound, int room,
                                      Found& found) {
  const uint32_t threads = blockDim.x, share = (row.fours() + threads - 1) / threads;
  const float low = preact_of(bound);  // NaN, which nothing is below, if no number has this key
  if (threadIdx.x == 0) found.with_some = found.kept = 0;
  sync_threads();
  if (!(largest < low)) found.shares[atomic_add(&found.with_some, 1)] = threadIdx.x;
  sync_threads();
  for (uint32_t i = threadIdx.x; i < found.with_some * share; i += threads) {
    const uint32_t four = found.shares[i / share] + i % share * threads;
    if (four >= row.fours()) continue;
    row.each(row.four(four), four, [&](uint32_t j, float p) {
      if (!(p < low)) keep(key_of(p, j), found.candidates, room, found);
    });
  }
  sync_threads();
  return found.kept;
}

// The k-th largest key, digit by digit from the highest, or a number between it and the next.
__device__ __forceinline__ uint64_t kth_largest(const Row& row, int k, Found& found) {
  uint64_t prefix = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    for (int b = threadIdx.x; b < kBins; b += blockDim.x) found.bins[b] = 0;
    sync_threads();
    row.share<1>([&](uint32_t j, float p) {
      const uint64_t key = key_of(p, j);
      if (shift == 56 || (key ^ prefix) >> (shift + 8) == 0)
        atomic_add(&found.bins[key >> shift & 255], 1);
    });
    sync_threads();
    for (int b = threadIdx.x; b < kBins; b += blockDim.x) {
      int above = 0;
      for (int higher = b + 1; higher < kBins; ++higher) above += found.bins[higher];
      if (above < k && k <= above + found.bins[b]) found.bin = b, found.above = above;
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

// The k largest keys, however many come close.
__device__ __forceinline__ void keep_largest(const Row& row, int k, uint64_t* keys, Found& found) {
  const uint64_t least = kth_largest(row, k, found);
  if (threadIdx.x == 0) found.kept = 0;
  sync_threads();
  row.share<1>([&](uint32_t j, float p) {
    const uint64_t key = key_of(p, j);
    if (key >= least) keep(key, keys, k, found);
  });
  sync_threads();
}

// The k largest of `count` keys, each where its rank says.
__device__ __forceinline__ void write_ranked(const uint64_t* keys, int count, const Select& c) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const uint64_t key = keys[i];
    int rank = 0;
    for (int other = 0; other < count; ++other) rank += keys[other] > key;
    if (rank >= c.k) continue;
    const float p = preact_of(key);
    const int64_t at = blockIdx.x * c.k + rank;
    c.values[at] = p < 0 ? 0.f : p;
    c.indices[at] = index_of(key);
  }
}

__global__ void __launch_bounds__(kMostThreads, 2) select(Select c) {
  Found& found = *shared<Found>();
  const int k = static_cast<int>(c.k), room = 2 * blockDim.x;
  const Row row{c.preacts + blockIdx.x * preact_pitch(c.N), static_cast<uint32_t>(c.N)};

  float largest = -float_of(0x7F800000u);
  row.share<6>([&](uint32_t, float p) { largest = larger(largest, p); });
  const int candidates = gather(row, largest, lower_bound(largest, k), room, found);
  if (candidates <= room) return write_ranked(found.candidates, candidates, c);

  uint64_t* const keys = c.keys + blockIdx.x * c.k;
  keep_largest(row, k, keys, found);
  write_ranked(keys, k, c);
}

// Enough to have much of a row under way, and, as far as there are so many, more than k: the more
// shares, the fewer candidates.
int threads_for(int64_t N, int64_t k) {
  const int64_t threads = (std::max(N / 48, 2 * k) + 31) / 32 * 32;
  return static_cast<int>(std::clamp<int64_t>(threads, 64, kMostThreads));
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

// Bytes of preactivations that the second-level cache holds.
constexpr int64_t kPreactBytes = int64_t{24} << 20;

// As many tokens as fit there, in whole tiles, but at least so many that multiplying by W_enc takes
// longer than reading it.
int64_t tokens_at_once(int64_t tokens, const Encoder& encoder) {
  const int64_t cached = kPreactBytes / (4 * preact_pitch(encoder.count)) / 128 * 128;
  return std::min(tokens, std::max<int64_t>(256, cached));
}

int64_t preact_bytes(int64_t tokens, const Encoder& encoder) {
  return 4 * tokens * preact_pitch(encoder.count);
}

}  // namespace

int64_t encode_workspace(int64_t tokens, const Encoder& encoder) {
  const int64_t some = tokens_at_once(tokens, encoder);
  return preact_bytes(some, encoder) + (8 * some * encoder.k + 31) / 32 * 32;
}

void encode(const Rows& x, int64_t tokens, const Encoder& encoder, float* values, int64_t* indices,
            void* workspace, void* stream) {
  const int64_t N = encoder.count, k = encoder.k, most = tokens_at_once(tokens, encoder);
  auto* preacts = static_cast<float*>(workspace);
  auto* keys =
      reinterpret_cast<uint64_t*>(static_cast<char*>(workspace) + preact_bytes(most, encoder));
  in_pieces(tokens, most, [&](int64_t first, int64_t count) {
    Scan s{};
    s.x = from(x, first), s.encoder = encoder, s.slots = count, s.preacts = preacts;
    scan(s, static_cast<Stream>(stream));
    launch(select, {count, threads_for(N, k), sizeof(Found)}, static_cast<Stream>(stream),
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
