// The scan in fp32 multiply-adds: any dtypes, widths and alignments.
#pragma once

#include "scan.h"

namespace saesteer::cuda::simt {

constexpr int kAcross = 16;   // threads side by side
constexpr int kDepth = 32;    // columns of x and W at once
constexpr int kLatents = 64;  // a tile's: four a thread, one 16-byte read
constexpr int kCols = kLatents / kAcross;
constexpr int kPad = 4;  // keeps 16-byte alignment and spreads the banks

// A block of kDown x kAcross threads takes kRows slots and kCols latents a thread.
template <int kRows_, int kDown_, int kBlocks_>
struct Plan {
  static constexpr int kRows = kRows_, kDown = kDown_, kTokens = kRows * kDown;
  static constexpr int kLatents = simt::kLatents;
  static constexpr int kThreads = kDown * kAcross;
  static constexpr int kBlocks = kBlocks_;  // at once on a multiprocessor
  static constexpr int64_t kShared = kDepth * (kTokens + kPad + kLatents + kPad) * 4;
};

// 3 blocks of 128 threads leave each 168 registers, 2 of 256 leave 128: room for its sums and for a
// panel on its way. Estimates: none has been timed.
using Fewest = Plan<2, 8, 3>;
using Few = Plan<8, 8, 3>;
using Many = Plan<8, 16, 2>;

// kCount rows, kDepth columns from `column` on, on their way to shared memory.
template <int kCount, int kThreads>
struct Panel {
  static constexpr int kChunks = kCount * kDepth / kChunk;
  static constexpr int kEach = (kChunks + kThreads - 1) / kThreads;
  float v[kEach][kChunk];

  template <class Row>
  __device__ __forceinline__ void load(Dtype dtype, int64_t width, int64_t column, const Row& row) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int q = threadIdx.x + i * kThreads;
      const int64_t chunk = column / kChunk + q % (kDepth / kChunk);
      const void* from = q < kChunks ? row(q / (kDepth / kChunk)) : nullptr;
      if (from && chunk < chunks(width))
        load8(from, dtype, width, chunk, aligned(from), v[i]);
      else
        for (float& e : v[i]) e = 0;
    }
  }
  // to[column][row]
  __device__ __forceinline__ void store(float* to) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int q = threadIdx.x + i * kThreads;
      if (q >= kChunks) continue;
      float* at = to + q % (kDepth / kChunk) * kChunk * (kCount + kPad) + q / (kDepth / kChunk);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) at[e * (kCount + kPad)] = v[i][e];
    }
  }
};

// kCount floats next to each other.
template <int kCount>
__device__ __forceinline__ void read(const float* from, float (&v)[kCount]) {
  if constexpr (kCount % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = from[i];
  }
}

// One block's tiles.
template <class P>
__device__ __forceinline__ void take_tiles(const Scan& s) {
  constexpr int kTokens = P::kTokens, kRows = P::kRows, kThreads = P::kThreads;
  const int64_t slots = slots_here(s), N = s.encoder.count, d = s.x.width;
  const int across = threadIdx.x % kAcross, down = threadIdx.x / kAcross;
  float* const x_panel = shared<float>();
  float* const W_panel = x_panel + kDepth * (kTokens + kPad);

  const Tiles<kTokens, kLatents> tiles(slots, N);
  for (int64_t tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x) {
    int64_t first_slot, first_latent;
    tiles.locate(tile, first_slot, first_latent);
    if (!sync_threads_or(any_open(s, first_slot, kTokens, slots, kThreads))) continue;

    const auto x_row = [&](int i) -> const void* {
      const int64_t token = token_of(s, first_slot + i, slots);
      return token < 0 ? nullptr : s.x[token];
    };
    const auto W_row = [&](int i) -> const void* {
      return first_latent + i < N ? s.encoder.W[first_latent + i] : nullptr;
    };
    Panel<kTokens, kThreads> x;
    Panel<kLatents, kThreads> W;
    float sum[kRows][kCols] = {};
    x.load(s.x.dtype, d, 0, x_row);
    W.load(s.encoder.W.dtype, d, 0, W_row);
    for (int64_t column = 0; column < d; column += kDepth) {
      // Nobody reads the last panels any more: these go to shared memory.
      sync_threads();
      x.store(x_panel);
      W.store(W_panel);
      sync_threads();
      // The next ones are on their way to registers while these are multiplied.
      if (column + kDepth < d) {
        x.load(s.x.dtype, d, column + kDepth, x_row);
        W.load(s.encoder.W.dtype, d, column + kDepth, W_row);
      }
#pragma unroll 8
      for (int i = 0; i < kDepth; ++i) {
        float a[kRows], b[kCols];
        read(x_panel + i * (kTokens + kPad) + down * kRows, a);
        read(W_panel + i * (kLatents + kPad) + across * kCols, b);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int c = 0; c < kCols; ++c) sum[r][c] = fmaf(a[r], b[c], sum[r][c]);
      }
    }

    int32_t token[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      token[r] = static_cast<int32_t>(token_of(s, first_slot + down * kRows + r, slots));
    const auto thresholds = thresholds_of(s, token, 0);
    const auto p = [&](int r, int c) -> float& { return sum[r][c]; };
    const int64_t own = first_latent + across * kCols;
    const int latents = latents_from(s, own);
    add_biases<kRows, kCols>(p, [&](int c) { return bias_of(s, own, c, latents); });
    deliver<kRows, kCols, kAcross>(s, token, thresholds, p, first_latent, first_latent + kLatents,
                                   across * kCols, [](int c) { return c; });
  }
}

}  // namespace saesteer::cuda::simt
