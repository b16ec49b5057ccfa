// The k largest keys of every token, while each thread sees a part of them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <memory>
#include <vector>

#include "../keys.h"
#include "kernels.h"

namespace saesteer::cpu {

// A thread keeps keys of a token until `slack_` more came in, and then drops those that k others
// beat: of its own, or of all threads' if each has its share of k.
class Largest {
 public:
  Largest(int64_t k, int64_t workers, int64_t tokens)
      : k_(k),
        workers_(workers),
        tokens_(tokens),
        share_(parts(k, workers)),
        slack_(slack(k, workers)),
        most_(most(k, workers)),
        seen_(workers * tokens),
        shares_(workers * tokens),
        keys_(new uint64_t[workers * tokens * most_]) {}

  // Of what a thread keeps of a token.
  static int64_t bytes(int64_t k, int64_t workers) { return 8 * most(k, workers); }

  void clear() {
    for (Seen& seen : seen_) seen = {0, slack_, -INFINITY};
    for (auto& share : shares_) share.store(0, std::memory_order_relaxed);
  }

  // Takes what `worker` sees of token t: p of count <= kBlock latents, from `first` on.
  void offer(int64_t t, int64_t worker, const float* p, int count, int64_t first) {
    Seen& seen = seen_[at(t, worker)];
    uint64_t* const keys = keys_of(t, worker);
    uint64_t bits = kernels().beats(p, count, seen.threshold, true);
    for (; bits; bits &= bits - 1) {
      const int j = __builtin_ctzll(bits);
      keys[seen.count++] = key_of(p[j], static_cast<uint32_t>(first + j));
    }
    if (seen.count > seen.most) narrow(t, worker, seen, keys);
  }

  // Gives those of token t in descending order.
  void take(int64_t t, std::vector<uint64_t>& keys) const {
    keys.clear();
    for (int64_t w = 0; w < workers_; ++w) {
      const uint64_t* const of = keys_of(t, w);
      keys.insert(keys.end(), of, of + seen_[at(t, w)].count);
    }
    const uint64_t bound = kernels().bound(keys.data(), keys.size(), k_);
    keys.resize(keep(keys.data(), keys.size(), bound));
    std::sort(keys.begin(), keys.end(), std::greater<>());
  }

 private:
  struct Seen {
    int64_t count, most;
    float threshold;  // k preactivations are not below it
  };

  static int64_t slack(int64_t k, int64_t workers) {
    return std::max<int64_t>(parts(k, workers), kBlock);
  }
  static int64_t most(int64_t k, int64_t workers) { return k + slack(k, workers) + kBlock; }

  int64_t at(int64_t t, int64_t worker) const { return worker * tokens_ + t; }
  uint64_t* keys_of(int64_t t, int64_t worker) const { return keys_.get() + at(t, worker) * most_; }

  void narrow(int64_t t, int64_t worker, Seen& seen, uint64_t* keys) {
    const auto bound = kernels().bound;
    const uint64_t own = seen.count < k_ ? 0 : bound(keys, seen.count, k_);
    const uint64_t share = bound(keys, seen.count, share_);
    shares_[t * workers_ + worker].store(share, std::memory_order_relaxed);
    const uint64_t reached = std::max(own, lowest_share(t));
    seen.count = keep(keys, seen.count, reached);
    seen.most = seen.count + slack_;
    seen.threshold = preact_of(reached);
  }

  // All threads together have k keys that reach it.
  uint64_t lowest_share(int64_t t) const {
    uint64_t lowest = ~uint64_t{0};
    for (int64_t w = 0; w < workers_; ++w)
      lowest = std::min(lowest, shares_[t * workers_ + w].load(std::memory_order_relaxed));
    return lowest;
  }

  // Moves the keys that reach `bound` to the front, and gives their number.
  static int64_t keep(uint64_t* keys, int64_t count, uint64_t bound) {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t key = keys[i];
      keys[kept] = key;
      kept += key >= bound;
    }
    return kept;
  }

  const int64_t k_, workers_, tokens_, share_, slack_, most_;
  std::vector<Seen> seen_;
  std::vector<std::atomic<uint64_t>> shares_;  // what a thread's share of k reaches; 0: nothing yet
  const std::unique_ptr<uint64_t[]> keys_;
};

}  // namespace saesteer::cpu
