// Tokens shared out among PyTorch's threads.
#pragma once

#include <vector>

#include "parallel.h"
#include "parts.h"

namespace saesteer::cpu {

// A worker's run of tokens, alone in its cache line.
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
  constexpr int64_t kWorthWaking = 48;  // tokens
  const int64_t workers = workers_for(parts(count, kWorthWaking));
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

}  // namespace saesteer::cpu
