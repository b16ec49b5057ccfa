// Two ops to measure the machine with: one of steer's signature that computes nothing, and one that
// only reads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstring>
#include <optional>

using torch::stable::Tensor;

namespace {

// The least that such an op does: it makes its output, and leaves it unwritten.
Tensor nothing(const Tensor& x, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
               const Tensor&, int64_t, std::optional<Tensor>, std::optional<Tensor>) {
  return torch::stable::new_empty(x, x.sizes());
}

// Reads all of W with all threads; the sum only keeps the compiler from leaving the reads out.
int64_t read(const Tensor& W) {
  constexpr int64_t kPiece = 1 << 18;
  constexpr int kLanes = 32;
  const char* data = static_cast<const char*>(W.const_data_ptr());
  const int64_t bytes = W.numel() * static_cast<int64_t>(W.element_size());
  std::atomic<int64_t> total{0}, next{0};
  const int64_t workers = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    int64_t sums[kLanes] = {};
    for (int64_t at; (at = next.fetch_add(kPiece)) < bytes;) {
      const int64_t end = at + kPiece < bytes ? at + kPiece : bytes;
      for (; at + static_cast<int64_t>(sizeof sums) <= end; at += sizeof sums) {
        int64_t words[kLanes];
        std::memcpy(words, data + at, sizeof words);
        for (int i = 0; i < kLanes; ++i) sums[i] += words[i];
      }
    }
    for (int64_t sum : sums) total += sum;
  });
  return total;
}

}  // namespace

STABLE_TORCH_LIBRARY(saesteer_bench, m) {
  m.def(
      "nothing(Tensor x, Tensor W_enc, Tensor b_enc, Tensor directions, Tensor features, "
      "Tensor values, int k, Tensor? mask=None, Tensor? order=None) -> Tensor");
  m.def("read(Tensor W) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(saesteer_bench, CPU, m) {
  m.impl("nothing", TORCH_BOX(&nothing));
  m.impl("read", TORCH_BOX(&read));
}
