#include "steer.h"

#include <cstring>
#include <vector>

#include "kernels.h"

namespace saesteer::cpu {

void steer(const Rows& x, int64_t tokens, const Encoder& encoder, const Rows& directions,
           const Features& features, const Values& values, const bool* mask, const OutRows& y) {
  const int64_t F = features.count;
  const auto write = [&](int64_t t, const float* acts) {
    thread_local std::vector<float> coef;
    thread_local std::vector<const void*> rows;
    coef.clear(), rows.clear();
    for (int64_t f = 0; acts && f < F; ++f)
      if (const float delta = values.data[t * values.stride + f] - acts[f]; delta != 0)
        coef.push_back(delta), rows.push_back(directions[f]);
    if (coef.empty())
      std::memcpy(y[t], x[t], x.width * bytes(x.dtype));
    else
      kernels().add(x[t], x.dtype, rows.data(), directions.dtype, coef.data(), coef.size(), x.width,
                    y[t], y.dtype);
  };
  measure(x, tokens, encoder, features, mask, write);
}

}  // namespace saesteer::cpu
