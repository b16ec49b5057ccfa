// The whole ladder in one launch, for few tokens: what it costs to start the scan and the last
// writes as kernels of their own is more than L0 costs, and most calls end there.
#include <cooperative_groups.h>

#include <algorithm>

#include "ladder.h"
#include "scan_mma.h"
#include "scan_simt.h"
#include "setting.h"

namespace saesteer::cuda {
namespace {

// Among all blocks of a launch whose shape says `together`; what they wrote before is then seen.
__device__ inline void sync_grid() { cooperative_groups::this_grid().sync(); }

// The scan between L0 and the last writes, and what can be done as soon as it is known to come.
template <class P, bool kBf16>
struct Mma : P {
  static constexpr int kDtype = static_cast<int>(kBf16 ? Dtype::bf16 : Dtype::f16);
  static __device__ __forceinline__ void expect(const Scan& s) {
    mma::expect_tile<P>(s, s.slots, blockIdx.x);
  }
  static __device__ __forceinline__ void scan(const Scan& s) { mma::take_tiles<P, kBf16>(s); }
};
template <class P, int kDtype_>
struct Simt : P {
  static constexpr int kDtype = kDtype_;
  static __device__ __forceinline__ void expect(const Scan&) {}
  static __device__ __forceinline__ void scan(const Scan& s) { simt::take_tiles<P>(s); }
};

// How the blocks share L0's tokens.
struct Sharing {
  bool each_all;  // every block measures all, so that it knows by itself whether all end here
  bool fetch;     // the directions come to shared memory while a token is measured
};

// Where they lie: after what L0 needs, aligned for copies of 16 bytes.
SAESTEER_HD inline int64_t fetched_from(int64_t features) {
  return (level0_bytes(features) + 15) / 16 * 16;
}
SAESTEER_HD inline int64_t bytes_of(const Rows& rows, int64_t count) {
  return count * rows.width * bytes(rows.dtype);
}

template <int kThreads>
__device__ __forceinline__ Rows fetch(const Rows& rows, int64_t count) {
  const int64_t size = bytes_of(rows, count);
  auto* const to = shared<unsigned char>(fetched_from(count));
  for (int64_t at = threadIdx.x * 16; at < size; at += kThreads * 16)
    copy_async(to + at, static_cast<const char*>(rows.data) + at, true);
  commit_copies();
  return {to, rows.dtype, rows.width};
}

// Whether this block found a token open among those that it measured.
template <int kDtype>
__device__ __forceinline__ bool level0(const Ladder& c, const Sharing& sharing,
                                       const Rows& directions) {
  const int64_t mine = blockIdx.x;
  bool any = false;
  for (int64_t token = sharing.each_all ? 0 : mine; token < c.tokens;
       token += sharing.each_all ? 1 : gridDim.x) {
    const bool is_mine = !sharing.each_all || token == mine;
    const float value = is_mine ? first_value(c, token) : 0.f;
    const bool open = measure(c, token);
    any |= open;
    wait_copies<0>();  // of directions; add_to_token has a barrier before they are read
    if (is_mine) keep_and_write<kDtype>(c, token, open, directions, value);
  }
  return any;
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    ladder_once(Ladder c, Scan s, Sharing sharing) {
  static_assert(S::kThreads == kTokenThreads);
  fix_dtypes<S::kDtype>(c.x, c.encoder.W, c.directions, c.y, s.x, s.encoder.W);
  // Of so many tokens one is often open.
  constexpr bool kAtOnce = S::kTokens > mma::Fewest::kTokens;
  if (kAtOnce) S::expect(s);
  const bool fetches = sharing.fetch && blockIdx.x < c.tokens;
  const bool open = level0<S::kDtype>(
      c, sharing, fetches ? fetch<S::kThreads>(c.directions, c.features.count) : c.directions);

  // Each block has measured all tokens: all leave here or none does.
  if (sharing.each_all) {
    if (!open) return;
    if (!kAtOnce) S::expect(s);  // while the blocks wait for each other
  }
  // Every block's L0 is done. Again all leave or none does, by a slot a thread; not by `beaten`:
  // others may have begun to count.
  sync_grid();
  static_assert(kFewTokens <= S::kThreads);
  if (!sync_threads_or(threadIdx.x < c.tokens && c.open.token[threadIdx.x] >= 0)) return;
  if (!kAtOnce && !sharing.each_all) S::expect(s);  // while the first tile's tokens are looked up
  S::scan(s);
  // Every block's counts are in.
  sync_grid();
  settle_tokens<S::kDtype>(c);
}

// Up to so many rows of x and W at L0 every block reads them all, from the second-level cache: by
// estimate no longer than a barrier of the grid takes.
constexpr int64_t kRowsForAll = 6;
// The most bytes of directions that are fetched: they lie where the 16-bit scans then have 48 KB of
// stages or more, so that their blocks take no more shared memory for them.
constexpr int64_t kFetchedBytes = 32 << 10;

template <class S>
bool run(const Ladder& c, Scan s, Stream stream) {
  const int64_t F = c.features.count, rows = bytes_of(c.directions, F);
  Sharing sharing{};
  sharing.fetch = !c.acts && rows <= kFetchedBytes && rows % 16 == 0 &&
                  reinterpret_cast<uintptr_t>(c.directions.data) % 16 == 0;
  const int64_t shared =
      std::max<int64_t>(S::kShared, fetched_from(F) + (sharing.fetch ? rows : 0));
  const Device& here = device();
  if (shared > here.shared_limit) return false;
  // No more blocks than the scan alone would have.
  const int64_t most = std::min(most_together(here, ladder_once<S>, S::kThreads, shared),
                                S::kBlocks * int64_t{here.multiprocessors});
  if (most == 0) return false;
  s.least = 1, s.most = s.slots;
  const int64_t tiles = Tiles<S::kTokens, S::kLatents>(s.slots, s.encoder.count).count();
  // For L0 a block a token, as far as there are so many.
  const int64_t blocks = std::max(balanced(tiles, most), std::min(c.tokens, most));
  // Not in place, where one block may have written the x that another still measures.
  sharing.each_all =
      c.y.data != c.x.data && c.tokens <= blocks && c.tokens * (1 + F) <= kRowsForAll;
  return launch(ladder_once<S>, {blocks, S::kThreads, shared, true}, stream, c, s, sharing);
}

template <bool kBf16>
bool by_mma(const Ladder& c, const Scan& s, Stream stream) {
  return s.slots <= mma::Fewest::kTokens ? run<Mma<mma::Fewest, kBf16>>(c, s, stream)
                                         : run<Mma<mma::Few, kBf16>>(c, s, stream);
}

}  // namespace

// SAESTEER_LADDER=steps leaves this kernel out.
bool climb_once(const Ladder& c, const Scan& s, Dtype directions, Stream stream) {
  if (c.open.count || setting("SAESTEER_LADDER", {"steps"}) == "steps") return false;
  static_assert(mma::Few::kTokens == kFewTokens);
  const bool alike = s.x.dtype == s.encoder.W.dtype && s.x.dtype == directions;
  if (uses_mma(s)) {
    if (!alike) return false;
    return s.x.dtype == Dtype::bf16 ? by_mma<true>(c, s, stream) : by_mma<false>(c, s, stream);
  }
  // More take so long without tensor cores that two more launches hardly show.
  if (s.slots > simt::Fewest::kTokens) return false;
  return alike && s.x.dtype == Dtype::f32
             ? run<Simt<simt::Fewest, static_cast<int>(Dtype::f32)>>(c, s, stream)
             : run<Simt<simt::Fewest, -1>>(c, s, stream);
}

}  // namespace saesteer::cuda
