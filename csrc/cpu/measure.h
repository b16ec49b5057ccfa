// What a feature's activation is: the decision ladder, for many tokens at once.
//
//     p_j = W_enc[j] . x + b_j
//     a_f = p_f if p_f > 0 and fewer than k latents beat f, else 0      (NaN if p_f is not finite)
//     j beats f if p_j > p_f, or p_j = p_f and order_j < order_f      (j and f rows of W_enc)
//
// L0: a token whose p_f are all <= 0 is done after one dot product a feature.
// L1: for the others latents are counted until k of them beat f, and then a_f = 0.
// L2: only a feature that is live needs every latent.
#pragma once

#include <functional>

#include "../views.h"

namespace saesteer::cpu {

// Called at most once a token, from any thread: with its features' activations, or with nullptr for
// a token outside the mask.
using Settled = std::function<void(int64_t token, const float* acts)>;

// What becomes of tokens whose features are all 0, where it is the same for all: y = round(x +
// sum). L0 may write such a token while it reads x; it is not settled then.
struct Dead {
  const float* sum = nullptr;
  OutRows y = {};
};

// `mask` may be null: every token. Features are below the encoder's count.
void measure(const Rows& x, int64_t tokens, const Encoder& encoder, const Features& features,
             const bool* mask, const Dead& dead, const Settled& settled);

}  // namespace saesteer::cpu
