// How a whole is cut into parts.
#pragma once

#include <cstdint>

namespace saesteer::cpu {

// How many there are with `most` in each, the last with what is left.
constexpr int64_t parts(int64_t whole, int64_t most) { return (whole + most - 1) / most; }

// What each has if there are as few, but all are alike: whole units, as far as `most` allows.
constexpr int64_t alike(int64_t whole, int64_t most, int64_t unit) {
  if (whole <= most) return most;
  const int64_t even = parts(parts(whole, parts(whole, most)), unit) * unit;
  return even < most ? even : most;
}

}  // namespace saesteer::cpu
