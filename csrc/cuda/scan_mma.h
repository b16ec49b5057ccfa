// The scan on tensor cores by warps, for bf16 or fp16 x and W of one dtype, from compute capability
// 8.0 on. Panels of x and W pass through shared memory in several stages.
#pragma once

#include "scan.h"

namespace saesteer::cuda::mma {

constexpr int kDepth = 64, kRowBytes = 128;  // of a panel

// Where 16-byte chunk number `chunk` of a panel's row lies: neighbouring rows in other banks.
__device__ inline int place(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ (row % 8)) << 4);
}

// kDown x kAcross warps multiply kTokens x kLatents; if a block has more, they only copy.
template <int kTokens_, int kLatents_, int kDown_, int kAcross_, int kStages_>
struct Plan {
  static constexpr int kTokens = kTokens_, kLatents = kLatents_;
  static constexpr int kDown = kDown_, kAcross = kAcross_, kStages = kStages_;
  // kBlocks at once on a multiprocessor, so that one multiplies while the other ends a tile; they
  // leave a thread 255 registers.
  static constexpr int kThreads = 128, kBlocks = 2;
  static constexpr int kStageBytes = (kTokens + kLatents) * kRowBytes;
  // What one warp takes, in the tensor cores' units
  static constexpr int kM = kTokens / kDown / 16, kN = kLatents / kAcross / 8;
  static constexpr int64_t kShared = kStages * kStageBytes + kTokens * 4;
  static_assert(kBlocks * (kShared + 1024) <= 164 << 10, "as many fit an A100's multiprocessor");
  static_assert(kM >= 1 && kN % 2 == 0, "two units of latents are loaded at once");
  static constexpr int kWarps = kDown * kAcross;
  static_assert(32 * kWarps <= kThreads);
};

// Bytes of W that a block asks for ahead: what reaches it while it goes from tile to tile, by
// estimate 3 us of an H100's 3 TB/s shared by 264 blocks.
constexpr int kAheadBytes = 32 << 10;

// 16 tokens are the least that a product takes. The fewer, the more time goes into waiting for W:
// smaller tiles, for an even share of them, and more stages. Estimates: none has been timed.
using Fewest = Plan<16, 32, 1, 2, 8>;
using Few = Plan<64, 64, 2, 2, 5>;
using Many = Plan<128, 128, 2, 2, 2>;

// After so many panels a block looks whether others have decided its tokens meanwhile.
constexpr int kLook = 16;

// What one thread copies of each panel: the same 16-byte chunk of kEach rows, kStep apart. It keeps
// which: to find them anew takes more instructions than the copies.
template <class P>
struct Panels {
  static constexpr int kStep = P::kThreads / 8, kOfX = P::kTokens / kStep;  // the first rows
  static constexpr int kEach = (P::kTokens + P::kLatents) / kStep;
  static_assert(kStep % 8 == 0, "place swizzles them alike");
  static_assert(P::kTokens % kStep == 0 && P::kLatents % kStep == 0);
  const char *x, *W;  // from this thread's chunk of their first rows on
  uint32_t row_bytes, chunk;
  uint32_t at[kEach];  // the row of x, or of the tile's W; some row where there is none
  uint32_t there;      // bit i: whether there is one
  unsigned char* to;   // in the first stage

  __device__ __forceinline__ Panels(const Scan& s, int64_t first_latent, const int32_t* token,
                                    unsigned char* stages)
      : row_bytes(static_cast<uint32_t>(s.x.width * 2)), chunk(threadIdx.x % 8 * 16), there(0) {
    const int first = threadIdx.x / 8, left = latents_from(s, first_latent);
    x = static_cast<const char*>(s.x.data) + chunk;
    W = static_cast<const char*>(s.encoder.W[first_latent]) + chunk;
    to = stages + place(first, threadIdx.x % 8);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = first + i * kStep - (i < kOfX ? 0 : P::kTokens);
      const int from = i < kOfX ? token[row] : row < left ? row : -1;
      at[i] = from < 0 ? 0 : from;
      there |= (from < 0 ? 0u : 1u) << i;
    }
  }

  // Starts the copy of columns kDepth * k ... into a stage; zeros where there is nothing.
  __device__ __forceinline__ void load(uint32_t k, int stage) const {
    const bool inside = k * kRowBytes + chunk < row_bytes;
    const uint32_t column = inside ? k * kRowBytes : 0, here = inside ? there : 0;
    const char *const from_x = x + column, *const from_W = W + column;
    unsigned char* const into = to + stage * P::kStageBytes;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      copy_async(into + i * kStep * kRowBytes,
                 (i < kOfX ? from_x : from_W) + uint64_t{at[i]} * row_bytes, here >> i & 1);
  }
};

// Asks for the first columns of a tile's W, each warp for as many rows: its lanes take turns.
template <class P>
__device__ __forceinline__ void expect_tile(const Scan& s, int64_t slots, int64_t tile) {
  const Tiles<P::kTokens, P::kLatents> tiles(slots, s.encoder.count);
  constexpr int kApart = P::kThreads / P::kLatents;
  static_assert(P::kThreads % P::kLatents == 0);
  const int row = static_cast<int>(threadIdx.x) / kApart;
  if (tile >= tiles.count() || threadIdx.x % kApart) return;
  int64_t first_slot, first_latent;
  tiles.locate(tile, first_slot, first_latent);
  const int64_t row_bytes = s.x.width * 2;
  constexpr int kEach = kAheadBytes / P::kLatents;
  if (first_latent + row < s.encoder.count)
    fetch_ahead(s.encoder.W[first_latent + row],
                row_bytes < kEach ? static_cast<int>(row_bytes) : kEach);
}

template <class P, bool kBf16>
__device__ __forceinline__ void multiply(const unsigned char* stage,
                                         float (&sum)[P::kM][P::kN][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp / P::kAcross * P::kM * 16 + lane % 16;
  const int column = P::kTokens + warp % P::kAcross * P::kN * 8 + lane / 16 * 8 + lane % 8;
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    uint32_t a[P::kM][4], b[P::kN / 2][4];
#pragma unroll
    for (int m = 0; m < P::kM; ++m)
      load_matrices(a[m], stage + place(row + m * 16, 2 * k + lane / 16));
#pragma unroll
    for (int n = 0; n < P::kN / 2; ++n)
      load_matrices(b[n], stage + place(column + n * 16, 2 * k + lane / 8 % 2));
#pragma unroll
    for (int m = 0; m < P::kM; ++m)
#pragma unroll
      for (int n = 0; n < P::kN; ++n)
        multiply_add<kBf16>(sum[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
  }
}

// One block's tiles.
template <class P, bool kBf16>
__device__ __forceinline__ void take_tiles(const Scan& s) {
  const int64_t slots = slots_here(s), N = s.encoder.count;
  const int depth = static_cast<int>((s.x.width + kDepth - 1) / kDepth);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int kRows = P::kM * 2;  // of a tile's, a thread's
  const bool multiplies = 32 * P::kWarps == P::kThreads || warp < P::kWarps;
  unsigned char* const stages = shared<unsigned char>();
  int32_t* const token = shared<int32_t>(P::kStages * P::kStageBytes);

  const Tiles<P::kTokens, P::kLatents> tiles(slots, N);
  for (int64_t tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x) {
    int64_t first_slot, first_latent;
    tiles.locate(tile, first_slot, first_latent);
    // No open token: nothing to find out. The barrier also ends every use of the last tile's stages
    // and tokens.
    if (!sync_threads_or(any_open(s, first_slot, P::kTokens, slots, P::kThreads))) continue;
    for (int i = threadIdx.x; i < P::kTokens; i += P::kThreads)
      token[i] = static_cast<int32_t>(token_of(s, first_slot + i, slots));
    sync_threads();

    // The tokens of this thread's sums; a warp that only copies has another's.
    int32_t own[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      own[r] = token[warp / P::kAcross % P::kDown * P::kM * 16 + r / 2 * 16 + r % 2 * 8 + lane / 4];
    const auto thresholds = thresholds_of(s, own, 0);  // on their way until the tile's end

    // All stages but one are asked for. Beyond the last panel a group is empty, so that as many are
    // always under way.
    const Panels<P> panels(s, first_latent, token, stages);
    float sum[P::kM][P::kN][4] = {};
#pragma unroll
    for (int k = 0; k < P::kStages - 1; ++k) {
      if (k < depth) panels.load(k, k);
      commit_copies();
    }
    int stage = 0, free = P::kStages - 1;
    bool decided = false;
    for (int k = 0; k < depth; ++k) {
      // Every thread's copies of panel k have come, and nobody multiplies panel k - 1 any more.
      wait_copies<P::kStages - 2>();
      if (k % kLook < kLook - 1) {
        sync_threads();
      } else if (!sync_threads_or(any_open(s, first_slot, P::kTokens, slots, P::kThreads))) {
        decided = true;
        break;
      }
      // Into the stage of that one.
      if (k + P::kStages - 1 < depth) panels.load(k + P::kStages - 1, free);
      commit_copies();
      // With the last panel asked for, memory would have nothing to do until the next tile.
      if (k + P::kStages == depth) expect_tile<P>(s, slots, tile + gridDim.x);
      if (multiplies) multiply<P, kBf16>(stages + stage * P::kStageBytes, sum);
      free = stage;
      if (++stage == P::kStages) stage = 0;
    }

    if (decided) wait_copies<0>();  // the next tile's go into the same stages
    if (decided || !multiplies) continue;
    // Where multiply_add leaves them: rows r / 2 * 16 + r % 2 * 8, columns at + step(c).
    const auto p = [&](int r, int c) -> float& { return sum[r / 2][c / 2][r % 2 * 2 + c % 2]; };
    const auto step = [](int c) { return c / 2 * 8 + c % 2; };
    const int at = warp % P::kAcross * P::kN * 8 + lane % 4 * 2;
    const int latents = latents_from(s, first_latent + at);
    add_biases<kRows, P::kN * 2>(
        p, [&](int c) { return bias_of(s, first_latent + at, step(c), latents); });
    deliver<kRows, P::kN * 2, 4>(s, own, thresholds, p, first_latent, first_latent + P::kLatents,
                                 at, step);
  }
}

}  // namespace saesteer::cuda::mma
