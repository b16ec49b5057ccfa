// A few tokens' rows of x, in the type in which they meet W_enc.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.h"

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

}  // namespace saesteer::cpu
