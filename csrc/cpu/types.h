// The element types of the CPU kernels and the views they work on.
#pragma once

#include <cstddef>
#include <cstdint>

namespace saesteer::cpu {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum class Dtype { f32, bf16, f16 };

inline int64_t bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// A contiguous matrix that is read: `width` elements a row.
struct Rows {
  const void* data;
  Dtype dtype;
  int64_t width;

  const void* operator[](int64_t i) const {
    return static_cast<const char*>(data) + i * width * bytes(dtype);
  }
};

// One that is written.
struct OutRows {
  void* data;
  Dtype dtype;
  int64_t width;

  void* operator[](int64_t i) const { return static_cast<char*>(data) + i * width * bytes(dtype); }
};

// The SAE's encoder: p_j = W[j] . x + bias[j], j = 0..count-1; a token keeps its k largest.
struct Encoder {
  Rows W;
  const float* bias;
  int64_t count;
  int64_t k;
};

}  // namespace saesteer::cpu
