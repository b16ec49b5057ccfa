// A few tokens' rows of x, in the type in which they meet W_enc.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace saesteer::cpu {

class Tokens {
 public:
  static constexpr int kCapacity = 8;  // at least kernels().tokens and kFusedTokens

  Tokens(const Rows& x, const Rows& W) : x_(x) {
    const bool native = x.dtype == Dtype::bf16 && W.dtype == Dtype::bf16 && kernels().native_bf16;
    dtype_ = native ? Dtype::bf16 : Dtype::f32;
  }

  // Takes count <= kernels().tokens tokens.
  void load(const int64_t* tokens, int count) {
    count_ = count;
    if (dtype_ != x_.dtype) scratch_.resize(kernels().tokens * x_.width);
    for (int i = 0; i < count; ++i) {
      rows_[i] = x_[tokens[i]];
      if (dtype_ == x_.dtype) continue;
      float* copy = scratch_.data() + i * x_.width;
      kernels().to_f32(rows_[i], x_.dtype, x_.width, copy);
      rows_[i] = copy;
    }
  }

  // Takes as many of the tokens first ... end - 1 as fit.
  void load_from(int64_t first, int64_t end) {
    int64_t tokens[kCapacity];
    const int m = static_cast<int>(std::min<int64_t>(kernels().tokens, end - first));
    for (int i = 0; i < m; ++i) tokens[i] = first + i;
    load(tokens, m);
  }

  int count() const { return count_; }

  // out[i * kBlock + j] = p of token i and latent row w[j].
  void dots(const void* const* w, Dtype w_dtype, int n, const float* bias, float* out,
            bool cold) const {
    kernels().dots(rows_, dtype_, count_, w, w_dtype, n, x_.width, bias, out, cold);
  }

 private:
  const Rows x_;
  Dtype dtype_;
  int count_ = 0;
  const void* rows_[kCapacity];
  std::vector<float> scratch_;
};

// A worker's run of tokens.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

// Hands out spans of tokens: first the worker's own share, which its core may still have in cache
// from the call before, then what is left of the others'.
class Spans {
 public:
  static constexpr int64_t kLength = 12;  // a multiple of every tile's tokens

  Spans(std::vector<Share>& shares, int64_t worker) : shares_(shares), at_(worker) {}

  bool take(int64_t& from, int64_t& to) {
    for (; visited_ < shares_.size(); ++visited_, at_ = (at_ + 1) % shares_.size()) {
      Share& share = shares_[at_];
      from = share.next.fetch_add(kLength, std::memory_order_relaxed);
      to = std::min(share.end, from + kLength);
      if (from < to) return true;
    }
    return false;
  }

 private:
  std::vector<Share>& shares_;
  size_t at_, visited_ = 0;
};

// Calls work(spans) once a worker. Threads are woken only for work that outlasts the waking.
template <class F>
void over_tokens(int64_t count, const F& work) {
  constexpr int64_t kWorthWaking = 48;
  const int64_t workers = workers_for((count + kWorthWaking - 1) / kWorthWaking);
  std::vector<Share> shares(workers);
  for (int64_t w = 0; w < workers; ++w) {
    shares[w].next = w * count / workers;
    shares[w].end = (w + 1) * count / workers;
  }
  parallel(workers, workers, [&](Pieces&, int64_t worker) {
    Spans spans(shares, worker);
    work(spans);
  });
}

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

inline int64_t blocks(const Encoder& encoder) { return (encoder.count + kBlock - 1) / kBlock; }

}  // namespace saesteer::cpu
