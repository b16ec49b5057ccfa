// The decision ladder's arithmetic: when p_f is decided, which latents beat it, and what its
// activation is. Plain functions, the same on the host and on the device.
#pragma once

#include "../keys.h"

namespace saesteer::cuda {

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

// The same for latents that all lie on one side of f, in one comparison: those whose p_j exceeds
// this. NaN exceeds every number.
SAESTEER_HD inline float threshold_of(float p_f, bool before_f) {
  return before_f ? float_of(bits_of(p_f) - 1) : p_f;  // the float below, as p_f > 0
}
SAESTEER_HD inline bool exceeds(float p_j, float threshold) { return !(p_j <= threshold); }

}  // namespace saesteer::cuda
