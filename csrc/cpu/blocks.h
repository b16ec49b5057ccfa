// The latents, a block at a time.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "parallel.h"

namespace saesteer::cpu {

// A block of kBlock consecutive latents (fewer at the end): its rows of W_enc.
struct Block {
  int64_t first;
  int count;
  const void* rows[kBlock + kRowsAhead];

  // Takes a block, and of `next`, which the same thread will take then, what is read ahead.
  void select(const Encoder& encoder, int64_t block, int64_t next) {
    first = block * kBlock;
    count = static_cast<int>(std::min<int64_t>(kBlock, encoder.count - first));
    for (int j = 0; j < count; ++j) rows[j] = encoder.W[first + j];
    for (int j = 0; j < kRowsAhead; ++j)
      rows[count + j] = encoder.W[std::min(next * kBlock + j, encoder.count - 1)];
  }

  // Row j's place in a word of this block's comparisons; 0 if it lies outside.
  uint64_t bit(int64_t j) const {
    return j >= first && j < first + count ? uint64_t{1} << (j - first) : 0;
  }
};

inline int64_t blocks(const Encoder& encoder) { return parts(encoder.count, kBlock); }

// Of `tokens`, how many pass over W_enc at once: a pass for a few reads as much as one for many.
inline int64_t at_once(int64_t tokens, int64_t most) { return alike(tokens, most, kGroupTokens); }

// Calls work(block) for the blocks that a worker takes, until it gives false.
template <class F>
void each_block(const Encoder& encoder, Pieces& pieces, const F& work) {
  Block block;
  int64_t b, next;
  for (bool more = pieces.take(b); more; b = next) {
    more = pieces.take(next);
    block.select(encoder, b, next);
    if (!work(block)) return;
  }
}

}  // namespace saesteer::cpu
