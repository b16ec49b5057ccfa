// What the CUDA kernels compute, as plain functions over device memory. Each enqueues its work on
// `stream`, on the current device, without waiting for it; `workspace` must last until that is
// done.
//
// Indices of features and latents are read on the device only: one out of range makes what depends
// on it NaN, and nothing is read outside the tensors. A feature that is named twice is edited
// twice.
#pragma once

#include "../views.h"

namespace saesteer::cuda {

// The most features that one call takes on the current device.
int64_t most_features();

// Bytes that steer and feature_acts need: at most a megabyte, or 128 tokens' worth.
int64_t ladder_workspace(int64_t tokens, int64_t features);

// y = x + sum_f (value_f - a_f) directions_f. Tokens outside the mask, which may be null, and those
// whose values equal their activations are copied bit for bit. y may be x: then they are left
// alone.
void steer(const Rows& x, int64_t tokens, const Encoder& encoder, const Rows& directions,
           const Features& features, const Values& values, const bool* mask, const OutRows& y,
           void* workspace, void* stream);

// acts[t, f] = a_f.
void feature_acts(const Rows& x, int64_t tokens, const Encoder& encoder, const Features& features,
                  float* acts, void* workspace, void* stream);

// p[t, i] = rows[i] . x[t] + bias[i], summed as steer and feature_acts sum p_f.
void project(const Rows& x, int64_t tokens, const Rows& rows, int64_t count, const float* bias,
             float* p, void* stream);

// y = x + sum_f coef_f directions_f; tokens whose coefficients are all zero are copied.
void add_directions(const Rows& x, int64_t tokens, const Rows& directions, int64_t features,
                    const Values& coef, const OutRows& y, void* stream);

// Bytes that encode needs: the preactivations of as many tokens as fit the second-level cache, at
// least 256 if there are so many, and k keys of each.
int64_t encode_workspace(int64_t tokens, const Encoder& encoder);

// values[t, 0..k), descending, and indices[t, 0..k): the k largest p_j, ties to the lower index,
// NaN first; a value is max(p_j, 0).
void encode(const Rows& x, int64_t tokens, const Encoder& encoder, float* values, int64_t* indices,
            void* workspace, void* stream);

// y[t] = b_dec + sum_i values[t, i] W_dec[indices[t, i]], i < k; W_dec has `latents` rows.
void decode(const float* values, const int64_t* indices, int64_t tokens, int64_t k,
            const Rows& W_dec, int64_t latents, const float* b_dec, const OutRows& y, void* stream);

}  // namespace saesteer::cuda
