// Plain products with a few rows: what elementwise SAEs and directions are measured by.
#pragma once

#include "../views.h"

namespace saesteer::cpu {

// out[t, i] = rows[i] . x[t] + bias[i], i < count.
void project(const Rows& x, int64_t tokens, const Rows& rows, int64_t count, const float* bias,
             float* out);

}  // namespace saesteer::cpu
