// A few tokens' rows of x, in the type in which they meet W_enc.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "parallel.h"

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

  // Takes as many of the tokens first ... end - 1 as fit.
  void load_from(int64_t first, int64_t end) {
    int64_t tokens[kMost];
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
  const void* rows_[kMost];
  std::vector<float> scratch_;
};

// Calls work(from, to) for all of 0 ... count - 1 tokens, several tiles at a time: threads are
// woken only for work that outlasts the waking.
template <class F>
void in_pieces(int64_t count, const F& work) {
  const int64_t piece = 8 * kernels().tokens;
  parallel((count + piece - 1) / piece, [&](Pieces& pieces, int64_t) {
    for (int64_t p; pieces.take(p);) work(p * piece, std::min(count, (p + 1) * piece));
  });
}

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

  // Row j's place in a word of this block's comparisons; 0 if it lies outside.
  uint64_t bit(int64_t j) const {
    return j >= first && j < first + count ? uint64_t{1} << (j - first) : 0;
  }
};

inline int64_t blocks(const Encoder& encoder) { return (encoder.count + kBlock - 1) / kBlock; }

}  // namespace saesteer::cpu
