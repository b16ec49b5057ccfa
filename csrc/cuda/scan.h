// L1 and L2 of the ladder, and encode's product: preactivations of all latents for some tokens, a
// tile of tokens times latents at a time. Only encode stores them, those of a few tokens: else a
// tile is compared with each p_f, and only how many latents beat f is kept.
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
  // ... or, if not null, stored: preacts[slot, j], rows preact_pitch apart
  float* preacts;
};

// Rows of preactivations begin at a sector of memory.
SAESTEER_HD inline int64_t preact_pitch(int64_t latents) { return (latents + 7) / 8 * 8; }

// Up to kFewTokens the reading of W_enc is what takes the time, and small tiles stop sooner; up to
// kSomeTokens it takes about as long as the products. Then 24,576 latents are few rounds of tiles
// for 132 multiprocessors, and narrow ones fill them better; beyond it wide ones read x less often.
// Estimates: by counting, not by a clock.
constexpr int64_t kFewTokens = 64, kSomeTokens = 384;

// Those that are in use, 0 if another kernel serves so many.
__device__ inline int64_t slots_here(const Scan& s) {
  const int64_t slots = s.open_count ? *s.open_count : s.slots;
  return slots < s.least || slots > s.most ? 0 : slots;
}

__device__ inline int64_t token_of(const Scan& s, int64_t slot, int64_t slots) {
  return slot >= slots ? -1 : s.token ? s.token[slot] : slot;
}

// Tiles in the order in which they are taken: the first latents first, so that tokens are decided
// soon if these are the ones most often live; kSide blocks of tokens side by side, so that what
// they share stays in the cache. The tiles of one moment read fewest rows if as many are x's as
// W's: on 132 multiprocessors 16 times 128 tokens and 8 times 256 latents.
template <int kTokens, int kLatents>
struct Tiles {
  static constexpr int64_t kSide = 16;
  int64_t token_blocks, latent_blocks;

  SAESTEER_HD Tiles(int64_t slots, int64_t latents)
      : token_blocks((slots + kTokens - 1) / kTokens),
        latent_blocks((latents + kLatents - 1) / kLatents) {}
  SAESTEER_HD int64_t count() const { return token_blocks * latent_blocks; }
  SAESTEER_HD void locate(int64_t tile, int64_t& first_slot, int64_t& first_latent) const {
    if (token_blocks == 1) {  // without the divisions
      first_slot = 0, first_latent = tile * kLatents;
      return;
    }
    const int64_t group = tile / (kSide * latent_blocks), before = group * kSide;
    const int64_t side = token_blocks - before < kSide ? token_blocks - before : kSide;
    const int64_t rest = tile - before * latent_blocks;
    first_slot = (before + rest % side) * kTokens;
    first_latent = rest / side * kLatents;
  }
};

// Whether something is still to be found out about a token.
__device__ inline bool is_open(const Scan& s, int64_t token) {
  if (token < 0 || s.preacts) return token >= 0;
  for (int64_t f = 0; f < s.features.count; ++f)
    if (load_relaxed(s.beaten + token * s.features.count + f) < s.encoder.k) return true;
  return false;
}

// Whether this thread's share of a tile's tokens has one that is.
__device__ inline bool any_open(const Scan& s, int64_t first_slot, int tokens, int64_t slots,
                                int threads) {
  bool open = false;
  for (int i = threadIdx.x; i < tokens && !open; i += threads)
    open = is_open(s, token_of(s, first_slot + i, slots));
  return open;
}

// Latents from this one on, or a number beyond every tile that fits an int.
__device__ inline int latents_from(const Scan& s, int64_t latent) {
  const int64_t left = s.encoder.count - latent;
  return static_cast<int>(left < (1 << 20) ? left : 1 << 20);
}

// The bias of latent first + i; those beyond the last, of which there are `left`, beat nothing.
__device__ inline float bias_of(const Scan& s, int64_t first, int i, int left) {
  return i < left ? s.encoder.bias[first + i] : -float_of(0x7F800000u);
}

// Makes p(r, c) of what a thread has summed.
template <int kRows, int kCols, class P, class Bias>
__device__ __forceinline__ void add_biases(const P& p, const Bias& bias) {
#pragma unroll
  for (int c = 0; c < kCols; ++c) {
    const float b = bias(c);
#pragma unroll
    for (int r = 0; r < kRows; ++r) p(r, c) += b;
  }
}

// What the latents have to beat: p of one feature, for the tokens of kRows slots.
template <int kRows>
struct Thresholds {
  int64_t index;  // of the feature
  float p[kRows];
};

template <int kRows>
__device__ __forceinline__ Thresholds<kRows> thresholds_of(const Scan& s,
                                                           const int32_t (&token)[kRows],
                                                           int64_t f) {
  Thresholds<kRows> thresholds{};
  const int64_t F = s.features.count;
  if (f >= F) return thresholds;
  thresholds.index = s.features.index[f];
#pragma unroll
  for (int r = 0; r < kRows; ++r) thresholds.p[r] = token[r] < 0 ? 0.f : s.p[token[r] * F + f];
  return thresholds;
}

template <int kCols, class P>
__device__ __forceinline__ int exceeding(const P& p, float threshold) {
  float number = 0;  // a comparison gives 0 or 1 as a float in one instruction
#pragma unroll
  for (int c = 0; c < kCols; ++c) number += exceeds(p(c), threshold) ? 1.f : 0.f;
  return static_cast<int>(number);
}

// How many of the latents first + at + step(c), c < kCols, beat a feature; p(c) are their p.
template <int kCols, class P, class Step>
__device__ __forceinline__ int beating(const Scan& s, const P& p, float p_f, int64_t index,
                                       int64_t first, int64_t end, int at, const Step& step) {
  static_assert(kCols <= 64, "ties are kept as bits of a word");
  const int64_t* const order = s.encoder.order;
  const bool inside = index >= first && index < end;
  if (!inside) {
    // Nearly every tile: without an order all its latents lie on one side of f, and with one it has
    // hardly ever a tie.
    const int beaten = exceeding<kCols>(p, threshold_of(p_f, !order && index >= end));
    if (!order || exceeding<kCols>(p, threshold_of(p_f, true)) == beaten) return beaten;
  }
  const int self = inside ? static_cast<int>(index - first) - at : -1;
  int beaten = 0;
  if (order) {
    uint64_t ties = 0;  // looked up one by one afterwards
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      beaten += step(c) != self && exceeds(p(c), p_f);
      ties |= uint64_t{step(c) != self && p(c) == p_f} << c;
    }
    for (; ties; ties &= ties - 1)
      beaten += order[first + at + step(lowest_bit(ties))] < order[index];
  } else {
#pragma unroll
    for (int c = 0; c < kCols; ++c) beaten += beats(p(c), step(c), p_f, self);
  }
  return beaten;
}

// Two latents at a time: a row has room for an even number.
template <int kRows, int kCols, class P, class Step>
__device__ __forceinline__ void store(const Scan& s, const int32_t (&token)[kRows], const P& p,
                                      int64_t first, const Step& step) {
  static_assert(kCols % 2 == 0);
  const int left = latents_from(s, first);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (token[r] < 0) continue;
    auto* const row =
        reinterpret_cast<float2*>(s.preacts + token[r] * preact_pitch(s.encoder.count) + first);
#pragma unroll
    for (int c = 0; c < kCols; c += 2)
      if (step(c) < left) row[step(c) / 2] = make_float2(p(r, c), p(r, c + 1));
  }
}

// The end of a tile, whose latents are first ... end - 1. Each thread holds p(r, c) of kRows slots,
// whose tokens are given, and of the latents first + at + step(c); kLanes lanes, next to each
// other, hold the same slots. `thresholds` are the first feature's. All threads of a warp come here
// together.
template <int kRows, int kCols, int kLanes, class P, class Step>
__device__ __forceinline__ void deliver(const Scan& s, const int32_t (&token)[kRows],
                                        Thresholds<kRows> thresholds, const P& p, int64_t first,
                                        int64_t end, int at, const Step& step) {
  if (s.preacts) return store<kRows, kCols>(s, token, p, first + at, step);
  const int64_t F = s.features.count;
  for (int64_t f = 0; f < F; ++f) {
    const Thresholds<kRows> now = thresholds;
    thresholds = thresholds_of(s, token, f + 1);  // under way while these are counted
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      int beaten = 0;
      if (undecided(now.p[r]))
        beaten = beating<kCols>(
            s, [&](int c) { return p(r, c); }, now.p[r], now.index, first, end, at, step);
      // Of the lanes with this slot one adds for all.
      for (int lanes = 1; lanes < kLanes; lanes *= 2) beaten += shuffle_xor(beaten, lanes);
      if (beaten && threadIdx.x % kLanes == 0) atomic_add(s.beaten + token[r] * F + f, beaten);
    }
  }
}

// As many blocks as the device runs at once, or fewer with the same number of tiles each.
inline int64_t balanced(int64_t tiles, int64_t at_once) {
  if (tiles <= at_once) return tiles;
  const int64_t rounds = (tiles + at_once - 1) / at_once;
  return (tiles + rounds - 1) / rounds;
}

// A scan by a kernel whose blocks take the tiles of plan P.
template <class P, class Kernel>
void launch_tiles(Kernel* kernel, const Scan& s, Stream stream) {
  const int64_t slots = s.most < s.slots ? s.most : s.slots;
  const int64_t tiles = Tiles<P::kTokens, P::kLatents>(slots, s.encoder.count).count();
  const int64_t blocks = balanced(tiles, P::kBlocks * device().multiprocessors);
  launch(kernel, {blocks, P::kThreads, P::kShared}, stream, s);
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
