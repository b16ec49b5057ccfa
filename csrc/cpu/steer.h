// What is written: x' = x + sum_f (value_f - a_f) directions_f, with a_f from measure.h, or given.
#pragma once

#include "measure.h"

namespace saesteer::cpu {

// Writes y, of x's dtype and shape. Tokens outside the mask, and those whose values equal their
// activations, are copied bit for bit. y may be x: then they are left alone.
void steer(const Rows& x, int64_t tokens, const Encoder& encoder, const Rows& directions,
           const Features& features, const Values& values, const bool* mask, const OutRows& y);

// y = x + sum_f coef_f directions_f; tokens whose coefficients are all zero are copied bit for bit.
void add(const Rows& x, int64_t tokens, const Rows& directions, int64_t features,
         const Values& coef, const OutRows& y);

}  // namespace saesteer::cpu
