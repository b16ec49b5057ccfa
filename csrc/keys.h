// A preactivation and its latent's index as one integer, in the order in which encode ranks them:
// the larger p first, then the lower index; NaN first of all. The same on the host and on a device.
#pragma once

#include <cstdint>
#include <cstring>

#include "views.h"

namespace saesteer {

SAESTEER_HD inline uint32_t bits_of(float v) {
  uint32_t u;
  memcpy(&u, &v, sizeof u);
  return u;
}

SAESTEER_HD inline float float_of(uint32_t u) {
  float v;
  memcpy(&v, &u, sizeof v);
  return v;
}

SAESTEER_HD inline float not_a_number() { return float_of(0x7FC00000u); }

SAESTEER_HD inline uint64_t key_of(float p, uint32_t index) {
  const uint32_t u = bits_of(p + 0.f);  // -0 becomes +0
  const uint32_t ordered = p != p ? ~0u : u >> 31 ? ~u : u | 0x80000000u;
  return uint64_t{ordered} << 32 | static_cast<uint32_t>(~index);
}

SAESTEER_HD inline float preact_of(uint64_t key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  if (ordered == ~0u) return not_a_number();
  return float_of(ordered >> 31 ? ordered & 0x7FFFFFFFu : ~ordered);
}

SAESTEER_HD inline int64_t index_of(uint64_t key) { return static_cast<uint32_t>(~key); }

}  // namespace saesteer
