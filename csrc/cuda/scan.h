// L1 and L2 of the ladder, and encode's product: preactivations of all latents for some tokens, a
// tile of tokens times latents at a time. They are never stored: a tile is compared with each p_f,
// and only how many latents beat f is kept. (encode stores them, a few tokens at a time.)
//
// Three scans share this file's schedule and its end of a tile: scan_simt.h for any dtypes,
// scan_mma.h and scan_wgmma.cu for 16-bit ones.
#pragma once

#include "elements.h"
#include "launch.h"

namespace saesteer::cuda {

// The tokens and what is wanted of them. A slot is a row of the scan.
struct Scan {
  Rows x;
  Encoder encoder;
  int64_t slots;
  const int32_t* open_count;  // how many slots are in use, on the device; null: all
  const int32_t* token;       // the row of x of a slot, -1: none; null: its own number
  int64_t least, most;        // a kernel leaves at once unless so many slots are in use

  // counted: beaten[token, f] grows by the latents that beat f ...
  Features features;
  const float* p;
  int32_t* beaten;
  // ... or, if not null, stored: preacts[slot, j]
  float* preacts;
};

// Those that are in use, 0 if another kernel serves so many.
__device__ inline int64_t slots_here(const Scan& s) {
  const int64_t slots = s.open_count ? *s.open_count : s.slots;
  return slots < s.least || slots > s.most ? 0 : slots;
}

__device__ inline int64_t token_of(const Scan& s, int64_t slot, int64_t slots) {
  return slot >= slots ? -1 : s.token ? s.token[slot] : slot;
}

// Tiles in the order in which they are taken: the first latents first, so that tokens are decided
// soon if these are the ones most often live; a few blocks of tokens side by side, so that what
// they share stays in the cache.
template <int kTokens, int kLatents>
struct Tiles {
  static constexpr int64_t kSide = 8;
  int64_t token_blocks, latent_blocks;

  SAESTEER_HD Tiles(int64_t slots, int64_t latents)
      : token_blocks((slots + kTokens - 1) / kTokens),
        latent_blocks((latents + kLatents - 1) / kLatents) {}
  SAESTEER_HD int64_t count() const { return token_blocks * latent_blocks; }
  SAESTEER_HD void locate(int64_t tile, int64_t& first_slot, int64_t& first_latent) const {
    const int64_t group = tile / (kSide * latent_blocks), before = group * kSide;
    const int64_t side = token_blocks - before < kSide ? token_blocks - before : kSide;
    const int64_t rest = tile - before * latent_blocks;
    first_slot = (before + rest % side) * kTokens;
    first_latent = rest / side * kLatents;
  }
};

// Whether this thread's share of a tile's tokens has one that is not decided yet.
__device__ inline bool any_open(const Scan& s, int64_t first_slot, int tokens, int64_t slots,
                                int thread, int threads) {
  if (s.preacts) return true;
  bool open = false;
  for (int i = thread; i < tokens && !open; i += threads) {
    const int64_t token = token_of(s, first_slot + i, slots);
    for (int64_t f = 0; token >= 0 && f < s.features.count && !open; ++f)
      open = load_relaxed(s.beaten + token * s.features.count + f) < s.encoder.k;
  }
  return open;
}

// A bias for every latent; those beyond the last beat nothing.
__device__ inline float bias_of(const Scan& s, int64_t latent) {
  return latent < s.encoder.count ? s.encoder.bias[latent] : -float_of(0x7F800000u);
}

// The end of a tile, whose latents are first ... end - 1. Each thread holds p(r, c) of kRows slots
// and of the kCols latents first + at + step(c), without their biases; kLanes lanes, next to each
// other, hold the same slots. All threads of a warp come here together.
template <int kRows, int kCols, int kLanes, class P, class Slot, class Step>
__device__ __forceinline__ void deliver(const Scan& s, int64_t slots, const P& p, const Slot& slot,
                                        int64_t first, int64_t end, int at, const Step& step) {
#pragma unroll
  for (int c = 0; c < kCols; ++c) {
    const float bias = bias_of(s, first + at + step(c));
#pragma unroll
    for (int r = 0; r < kRows; ++r) p(r, c) += bias;
  }
  static_assert(kCols <= 64, "ties are kept as bits of a word");
  const int64_t F = s.features.count, N = s.encoder.count;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t token = token_of(s, slot(r), slots);
    if (s.preacts) {
#pragma unroll
      for (int c = 0; c < kCols; ++c)
        if (token >= 0 && first + at + step(c) < N)
          s.preacts[token * N + first + at + step(c)] = p(r, c);
      continue;
    }
    for (int64_t f = 0; f < F; ++f) {
      const float p_f = token < 0 ? 0.f : s.p[token * F + f];
      const int64_t index = s.features.index[f];
      int beaten = 0;
      if (undecided(p_f)) {
        if (const int64_t* order = s.encoder.order) {
          const int self =
              index < first || index >= end ? -1 : static_cast<int>(index - first) - at;
          uint64_t ties = 0;
#pragma unroll
          for (int c = 0; c < kCols; ++c) {
            beaten += step(c) != self && clears(p(r, c), p_f);
            ties |= uint64_t{step(c) != self && p(r, c) == p_f} << c;
          }
          for (; ties; ties &= ties - 1)
            beaten += order[first + at + step(lowest_bit(ties))] < order[index];
        } else if (index < first || index >= end) {
          const float height = bar(p_f, index >= end);
#pragma unroll
          for (int c = 0; c < kCols; ++c) beaten += clears(p(r, c), height);
        } else {
#pragma unroll
          for (int c = 0; c < kCols; ++c)
            beaten += beats(p(r, c), step(c), p_f, static_cast<int>(index - first) - at);
        }
      }
      for (int lanes = 1; lanes < kLanes; lanes *= 2) beaten += shuffle_xor(beaten, lanes);
      if (beaten && threadIdx.x % kLanes == 0) atomic_add(s.beaten + token * F + f, beaten);
    }
  }
}

// As many blocks as the device runs at once, or fewer with the same number of tiles each.
inline int64_t balanced(int64_t tiles, int64_t at_once) {
  if (tiles <= at_once) return tiles;
  const int64_t rounds = (tiles + at_once - 1) / at_once;
  return (tiles + rounds - 1) / rounds;
}

// Enqueue a scan of at most s.slots slots. `scan` chooses; the others can be asked whether they
// take such a scan.
void scan(const Scan& s, Stream stream);
bool uses_mma(const Scan& s);  // for few tokens; if not, scan_simt

void scan_simt(const Scan& s, Stream stream);
bool takes_mma(const Scan& s);
void scan_mma(const Scan& s, Stream stream);
bool takes_wgmma(const Scan& s);
void scan_wgmma(const Scan& s, Stream stream);

}  // namespace saesteer::cuda
