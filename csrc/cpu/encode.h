// The SAE's own two halves: the k largest activations of a token, and the sparse decode.
#pragma once

#include "../views.h"

namespace saesteer::cpu {

// values[t, 0..k), descending, and indices[t, 0..k): the k largest p_j, ties to the lower index,
// NaN first; a value is max(p_j, 0).
void encode(const Rows& x, int64_t tokens, const Encoder& encoder, float* values, int64_t* indices);

// y[t] = b_dec + sum_i values[t, i] W_dec[indices[t, i]], i < k.
void decode(const float* values, const int64_t* indices, int64_t tokens, int64_t k,
            const Rows& W_dec, const float* b_dec, const OutRows& y);

}  // namespace saesteer::cpu
