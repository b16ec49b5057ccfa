// The ops: their schemas and their registration for the CPU.
#include <algorithm>
#include <unordered_set>

#include "calls.h"
#include "cpu/encode.h"
#include "cpu/project.h"
#include "cpu/steer.h"

namespace saesteer {
namespace {

// Where the elements of indices can be looked at.
struct Cpu {
  Cpu(const char*, const char*, const Tensor&) {}

  void check_indices(const char* op, const char* name, const int64_t* index, int64_t count,
                     int64_t N) const {
    for (int64_t i = 0; i < count; ++i)
      check(index[i] >= 0 && index[i] < N, op, name, " holds ", index[i], "; accepted: 0 to ",
            N - 1);
  }

  const Encoder& checked(const char*, const Encoder& encoder) const { return encoder; }

  const Features& checked(const char* op, const Features& features, int64_t N) const {
    check_indices(op, "features", features.index, features.count, N);
    if (features.count == 1) return features;
    std::unordered_set<int64_t> seen;
    for (int64_t f = 0; f < features.count; ++f)
      check(seen.insert(features.index[f]).second, op, "features holds ", features.index[f],
            " twice; a latent can be edited once");
    return features;
  }

  void steer(const Rows& x, int64_t tokens, const Encoder& encoder, const Rows& directions,
             const Features& features, const Values& values, const bool* mask,
             const OutRows& y) const {
    cpu::steer(x, tokens, encoder, directions, features, values, mask, y);
  }

  void feature_acts(const Rows& x, int64_t tokens, const Encoder& encoder, const Features& features,
                    float* acts) const {
    const int64_t F = features.count;
    cpu::measure(x, tokens, encoder, features, nullptr, {},
                 [&](int64_t t, const float* a) { std::copy(a, a + F, acts + t * F); });
  }

  void project(const Rows& x, int64_t tokens, const Rows& rows, int64_t count, const float* bias,
               float* p) const {
    cpu::project(x, tokens, rows, count, bias, p);
  }

  void add_directions(const Rows& x, int64_t tokens, const Rows& directions, int64_t features,
                      const Values& coef, const OutRows& y) const {
    cpu::add(x, tokens, directions, features, coef, y);
  }

  void encode(const Rows& x, int64_t tokens, const Encoder& encoder, float* values,
              int64_t* indices) const {
    cpu::encode(x, tokens, encoder, values, indices);
  }

  void decode(const float* values, const int64_t* indices, int64_t tokens, int64_t k,
              const Rows& W_dec, int64_t, const float* b_dec, const OutRows& y) const {
    cpu::decode(values, indices, tokens, k, W_dec, b_dec, y);
  }
};

}  // namespace
}  // namespace saesteer

STABLE_TORCH_LIBRARY(saesteer, m) {
  m.def(
      "steer(Tensor x, Tensor W_enc, Tensor b_enc, Tensor directions, Tensor features, "
      "Tensor values, int k, Tensor? mask=None, Tensor? order=None) -> Tensor");
  m.def(
      "steer_(Tensor(a!) x, Tensor W_enc, Tensor b_enc, Tensor directions, Tensor features, "
      "Tensor values, int k, Tensor? mask=None, Tensor? order=None) -> ()");
  m.def(
      "feature_acts(Tensor x, Tensor W_enc, Tensor b_enc, Tensor features, int k, "
      "Tensor? order=None) -> Tensor");
  m.def("project(Tensor x, Tensor W_enc, Tensor b_enc) -> Tensor");
  m.def("add_directions(Tensor x, Tensor directions, Tensor coef) -> Tensor");
  m.def("encode(Tensor x, Tensor W_enc, Tensor b_enc, int k) -> (Tensor values, Tensor indices)");
  m.def("decode(Tensor values, Tensor indices, Tensor W_dec, Tensor b_dec) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(saesteer, CPU, m) { saesteer::implement<saesteer::Cpu>(m); }
