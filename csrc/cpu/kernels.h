// The inner loops, one table of them an instruction set. Every p_j is accumulated in one order that
// depends on neither the number of tokens nor of threads, so results do not depend on them either.
#pragma once

#include "../views.h"
#include "isa.h"
#include "parts.h"

namespace saesteer::cpu {

// Latents scanned at once; their comparisons fit one 64-bit word.
constexpr int kBlock = 64;
// Rows beyond the last that may be read ahead.
constexpr int kRowsAhead = 32;
// Tokens that `dots_and_add` takes, and the most rows of w.
constexpr int kFusedTokens = 6, kFusedRows = 4;

struct Kernels {
  // Most tokens that `dots` takes at once.
  int tokens;
  // Whether a bf16 x meets a bf16 W as it is; any other pair is multiplied in fp32.
  bool native_bf16;

  // out[i * kBlock + j] = x[i] . w[j] + bias[j] for i < m <= tokens, j < n <= kBlock.
  // x is bf16 where native_bf16 applies, else fp32. `cold` says that w is not in cache yet; then w
  // has kRowsAhead more pointers.
  void (*dots)(const void* const* x, Dtype x_dtype, int m, const void* const* w, Dtype w_dtype,
               int n, int64_t d, const float* bias, float* out, bool cold);

  // As `dots` for kFusedTokens tokens and n <= kFusedRows, x as it is stored; and, in the same pass
  // over x, y[i] = round(x[i] + sum) as `add` makes it where x[i] is finite.
  void (*dots_and_add)(const void* const* x, Dtype x_dtype, const void* const* w, Dtype w_dtype,
                       int n, int64_t d, const float* bias, float* out, const float* sum,
                       void* const* y);

  // Bit j: p[j] beats `threshold`; NaN does, and an equal p[j] does if `ties`. n <= kBlock.
  uint64_t (*beats)(const float* p, int n, float threshold, bool ties);

  // A number that k of n different keys reach, and no more; 0 < k <= n.
  uint64_t (*bound)(const uint64_t* keys, int64_t n, int64_t k);

  // y = round(base + sum_i coef[i] rows[i]), summed in fp32 in the order of i; base in y's dtype,
  // or fp32. Unless `sum` is null it is the sum, and count is 0.
  void (*add)(const void* base, Dtype base_dtype, const float* sum, const void* const* rows,
              Dtype rows_dtype, const float* coef, int64_t count, int64_t d, void* y,
              Dtype y_dtype);

  void (*to_f32)(const void* src, Dtype dtype, int64_t n, float* dst);

  // As memcpy, which on some machines is slow for one row of a matrix.
  void (*copy)(const void* src, int64_t bytes, void* dst);
};

// The most tokens of a group, and the most groups, that `Tiles::dots` takes.
constexpr int kGroupTokens = 32, kMostGroups = 5;

// Packed tokens, and where their p go: out[i * kBlock + j].
struct Group {
  const void* packed;
  int tokens;
  float* out;
};

// What a packed token of d columns takes: whole tiles.
constexpr int64_t packed_bytes(int64_t d) { return parts(d, 32) * 64; }

// Products of many tokens at once, x and W both bf16.
struct Tiles {
  // Packs m <= kGroupTokens rows of x into m * packed_bytes(d) bytes.
  void (*pack)(const void* const* x, int m, int64_t d, void* packed);

  // groups[g].out[i * kBlock + j] = x[i] . w[j] + bias[j] for the tokens of count <= kMostGroups
  // groups and n <= kBlock rows; w has kRowsAhead more pointers, null or of rows that come next.
  void (*dots)(const Group* groups, int count, const void* const* w, int n, int64_t d,
               const float* bias);
};

extern const Kernels plain_kernels;
#ifdef SAESTEER_X86
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512bf16_kernels;
extern const Tiles amx_tiles;
#endif

// Those of the instruction set in use.
const Kernels& kernels();
// Null where `Kernels::dots` is all there is.
const Tiles* tiles();

}  // namespace saesteer::cpu
