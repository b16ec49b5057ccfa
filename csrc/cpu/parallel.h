// Work shared by PyTorch's own threads: every worker takes the next piece until none is left.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

namespace saesteer::cpu {

// Hands out 0, 1, ..., count - 1, each once.
class Pieces {
 public:
  explicit Pieces(int64_t count) : count_(count) {}
  bool take(int64_t& piece) {
    piece = next_.fetch_add(1, std::memory_order_relaxed);
    return piece < count_;
  }

 private:
  const int64_t count_;
  std::atomic<int64_t> next_{0};
};

inline int64_t workers_for(int64_t pieces) {
  return std::min<int64_t>(pieces, torch::stable::get_num_threads());
}

// Calls work(pieces, worker) once a worker.
template <class F>
void parallel(int64_t count, int64_t workers, const F& work) {
  Pieces pieces(count);
  if (workers <= 1) return work(pieces, 0);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t) { work(pieces, begin); });
}

template <class F>
void parallel(int64_t count, const F& work) {
  parallel(count, workers_for(count), work);
}

}  // namespace saesteer::cpu
