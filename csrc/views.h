// What kernels are handed, on any device: plain views of the ops' tensors.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define SAESTEER_HD __host__ __device__
#else
#define SAESTEER_HD
#endif

namespace saesteer {

enum class Dtype { f32, bf16, f16 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

SAESTEER_HD inline int64_t bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// A contiguous matrix that is read: `width` elements a row.
struct Rows {
  const void* data;
  Dtype dtype;
  int64_t width;

  SAESTEER_HD const void* operator[](int64_t i) const {
    return static_cast<const char*>(data) + i * width * bytes(dtype);
  }
};

// One that is written.
struct OutRows {
  void* data;
  Dtype dtype;
  int64_t width;

  SAESTEER_HD void* operator[](int64_t i) const {
    return static_cast<char*>(data) + i * width * bytes(dtype);
  }
};

// The SAE's encoder: p_j = W[j] . x + bias[j], j = 0..count-1; a token keeps its k largest.
// Row j is latent order[j]; without an order, latent j. Of equal p the lower latent is the larger.
struct Encoder {
  Rows W;
  const float* bias;
  int64_t count;
  int64_t k;
  const int64_t* order = nullptr;
};

// The features that are measured, as rows of W.
struct Features {
  const int64_t* index;
  int64_t count;
};

// Values of the edits: one row for all tokens (stride 0), or one a token (stride F).
struct Values {
  const float* data;
  int64_t stride;
};

}  // namespace saesteer
