// The ops of csrc/cuda for ctypes, whatever runs their kernels. Every function returns an error's
// text, or null.
#include "../guarded.h"
#include "cuda/kernels.h"
#include "cuda/rank.h"
#include "stream.h"

using namespace saesteer;

extern "C" {

struct Matrix {
  void* data;
  int dtype;  // 0 fp32, 1 bf16, 2 fp16
  int64_t width;

  operator Rows() const { return {data, static_cast<Dtype>(dtype), width}; }
  operator OutRows() const { return {data, static_cast<Dtype>(dtype), width}; }
};

int64_t ladder_workspace(int64_t tokens, int64_t F) { return cuda::ladder_workspace(tokens, F); }

int64_t encode_workspace(int64_t tokens, int64_t N, int64_t k) {
  return cuda::encode_workspace(tokens, {{}, nullptr, N, k});
}

const char* steer(Matrix x, int64_t tokens, Matrix W, const float* bias, int64_t N, int64_t k,
                  Matrix directions, const int64_t* features, int64_t F, const float* values,
                  int64_t stride, const bool* mask, const int64_t* order, Matrix y,
                  void* workspace) {
  return guarded([&] {
    cuda::steer(x, tokens, {W, bias, N, k, order}, directions, {features, F}, {values, stride},
                mask, y, workspace, kStream);
  });
}

const char* feature_acts(Matrix x, int64_t tokens, Matrix W, const float* bias, int64_t N,
                         int64_t k, const int64_t* features, int64_t F, const int64_t* order,
                         float* acts, void* workspace) {
  return guarded([&] {
    cuda::feature_acts(x, tokens, {W, bias, N, k, order}, {features, F}, acts, workspace, kStream);
  });
}

const char* project(Matrix x, int64_t tokens, Matrix rows, int64_t count, const float* bias,
                    float* p) {
  return guarded([&] { cuda::project(x, tokens, rows, count, bias, p, kStream); });
}

const char* add_directions(Matrix x, int64_t tokens, Matrix directions, int64_t F,
                           const float* coef, int64_t stride, Matrix y) {
  return guarded(
      [&] { cuda::add_directions(x, tokens, directions, F, {coef, stride}, y, kStream); });
}

const char* encode(Matrix x, int64_t tokens, Matrix W, const float* bias, int64_t N, int64_t k,
                   float* values, int64_t* indices, void* workspace) {
  return guarded(
      [&] { cuda::encode(x, tokens, {W, bias, N, k}, values, indices, workspace, kStream); });
}

const char* decode(const float* values, const int64_t* indices, int64_t tokens, int64_t k,
                   Matrix W_dec, int64_t latents, const float* b_dec, Matrix y) {
  return guarded(
      [&] { cuda::decode(values, indices, tokens, k, W_dec, latents, b_dec, y, kStream); });
}

// rank.h, keys.h

bool is_beaten(float p_j, int j, float p_f, int f) { return cuda::beats(p_j, j, p_f, f); }
bool is_beaten_from_one_side(float p_j, float p_f, bool before) {
  return cuda::exceeds(p_j, cuda::threshold_of(p_f, before));
}
bool is_undecided(float p_f) { return cuda::undecided(p_f); }
float settled(float p_f, int64_t beaten, int64_t k) { return cuda::settled(p_f, beaten, k); }
uint64_t key_of(float p, uint32_t index) { return saesteer::key_of(p, index); }
float preact_of(uint64_t key) { return saesteer::preact_of(key); }
int64_t index_of(uint64_t key) { return saesteer::index_of(key); }
}
