// A few tokens' rows of x, in the type in which they meet W_enc.
#pragma once

#include <vector>

#include "kernels.h"

namespace saesteer::cpu {

class Tokens {
 public:
  static constexpr int kMost = 8;

  Tokens(const Rows& x, const Rows& W) : x_(x) {
    const bool as_is = x.dtype == Dtype::bf16 && W.dtype == Dtype::bf16 && kernels().native_bf16;
    dtype_ = as_is ? Dtype::bf16 : Dtype::f32;
    if (dtype_ != x.dtype) scratch_.resize(kernels().tokens * x.width);
  }

  // Takes count <= kernels().tokens tokens.
  void load(const int64_t* tokens, int count) {
    count_ = count;
    for (int i = 0; i < count; ++i) {
      rows_[i] = x_[tokens[i]];
      if (scratch_.empty()) continue;
      float* copy = scratch_.data() + i * x_.width;
      kernels().to_f32(rows_[i], x_.dtype, x_.width, copy);
      rows_[i] = copy;
    }
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
  const void* rows_[kMost];
  std::vector<float> scratch_;
};

// A block of kBlock consecutive latents (fewer at the end): its rows of W_enc.
struct Block {
  int64_t first;
  int count;
  const void* rows[kBlock + kAhead];

  void select(const Encoder& encoder, int64_t block) {
    first = block * kBlock;
    count = static_cast<int>(std::min<int64_t>(kBlock, encoder.count - first));
    for (int j = 0; j < count + kAhead; ++j)
      rows[j] = encoder.W[std::min(first + j, encoder.count - 1)];
  }
};

inline int64_t blocks(const Encoder& encoder) { return (encoder.count + kBlock - 1) / kBlock; }

}  // namespace saesteer::cpu
