// The decision ladder's arithmetic: when p_f is decided, which latents beat it, and what its
// activation is; and p with its index as one integer, in the order in which encode ranks them.
// Plain functions, the same on the host and on the device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../views.h"

namespace saesteer::cuda {

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

// Whether the rank of p_f has to be known: it is above zero and finite.
SAESTEER_HD inline bool undecided(float p_f) { return p_f > 0 && p_f < float_of(0x7F800000u); }

// a_f as long as nothing beats it.
SAESTEER_HD inline float unbeaten(float p_f) {
  return p_f - p_f != 0 ? not_a_number() : p_f > 0 ? p_f : 0.f;
}

// a_f once `beaten` latents are known to beat it.
SAESTEER_HD inline float settled(float p_f, int64_t beaten, int64_t k) {
  return undecided(p_f) && beaten >= k ? 0.f : unbeaten(p_f);
}

// Latent j beats f: the larger p, then the lower index; NaN beats every number. f is told from its
// like by its index, because its p may have been summed in another order.
SAESTEER_HD inline bool beats(float p_j, int j, float p_f, int f) {
  return j != f && (j < f ? !(p_j < p_f) : !(p_j <= p_f));
}

// The same for latents that all lie on one side of f: those whose p_j is not at most this.
SAESTEER_HD inline float bar(float p_f, bool before_f) {
  return before_f ? float_of(bits_of(p_f) - 1) : p_f;  // the float below, as p_f > 0
}
SAESTEER_HD inline bool clears(float p_j, float bar) { return !(p_j <= bar); }

// Larger p first, then the lower index; NaN first of all.
SAESTEER_HD inline uint64_t key_of(float p, uint32_t index) {
  const uint32_t u = bits_of(p + 0.f);  // -0 becomes +0
  const uint32_t ordered = p != p ? ~0u : u >> 31 ? ~u : u | 0x80000000u;
  return uint64_t{ordered} << 32 | static_cast<uint32_t>(~index);
}

// max(p, 0)
SAESTEER_HD inline float value_of(uint64_t key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  if (ordered == ~0u) return not_a_number();
  return ordered >> 31 ? float_of(ordered & 0x7FFFFFFFu) : 0.f;
}

SAESTEER_HD inline int64_t index_of(uint64_t key) { return static_cast<uint32_t>(~key); }

}  // namespace saesteer::cuda
