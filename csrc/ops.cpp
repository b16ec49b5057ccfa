// The ops: their schemas and their registration for the CPU.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <unordered_set>

#include "checks.h"
#include "cpu/encode.h"
#include "cpu/project.h"
#include "cpu/steer.h"

namespace saesteer {
namespace {

void check_indices(const char* op, const char* name, const int64_t* index, int64_t count,
                   int64_t N) {
  for (int64_t i = 0; i < count; ++i)
    check(index[i] >= 0 && index[i] < N, op, name, " holds ", index[i], "; accepted: 0 to ", N - 1);
}

void check_distinct(const char* op, const Features& features) {
  std::unordered_set<int64_t> seen;
  for (int64_t f = 0; f < features.count; ++f)
    check(seen.insert(features.index[f]).second, op, "features holds ", features.index[f],
          " twice; a latent can be edited once");
}

Features checked(const char* op, const Features& features, int64_t N) {
  check_indices(op, "features", features.index, features.count, N);
  if (features.count > 1) check_distinct(op, features);
  return features;
}

// Writes y, which may be x.
void steer_to(const char* op, const Tensor& x, const Tensor& W_enc, const Tensor& b_enc,
              const Tensor& directions_in, const Tensor& features_in, const Tensor& values_in,
              int64_t k, const std::optional<Tensor>& mask_in, const std::optional<Tensor>& order,
              Tensor& y) {
  const Tensor features = packed(features_in), directions = packed(directions_in),
               values = packed(values_in), mask = mask_in ? packed(*mask_in) : Tensor();
  const Arguments given(op, x);
  const Rows rows = given.x();
  const Encoder encoder = given.encoder(W_enc, b_enc, k, order);
  const Features chosen = checked(op, given.features(features), encoder.count);
  const Rows added = given.directions(directions, chosen.count);
  const Values held = given.values("values", values, chosen.count);
  const bool* steered = mask_in ? given.mask(mask) : nullptr;
  cpu::steer(rows, tokens_of(x), encoder, added, chosen, held, steered, given.into(y));
}

Tensor steer(const Tensor& x_in, const Tensor& W_enc, const Tensor& b_enc, const Tensor& directions,
             const Tensor& features, const Tensor& values, int64_t k, std::optional<Tensor> mask,
             std::optional<Tensor> order) {
  const Tensor x = packed(x_in);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  steer_to("steer", x, W_enc, b_enc, directions, features, values, k, mask, order, y);
  return y;
}

void steer_(Tensor x, const Tensor& W_enc, const Tensor& b_enc, const Tensor& directions,
            const Tensor& features, const Tensor& values, int64_t k, std::optional<Tensor> mask,
            std::optional<Tensor> order) {
  Arguments("steer_", x).overwrites(W_enc, b_enc, directions, features, values, mask, order);
  steer_to("steer_", x, W_enc, b_enc, directions, features, values, k, mask, order, x);
}

Tensor add_directions(const Tensor& x_in, const Tensor& directions_in, const Tensor& coef_in) {
  const Tensor x = packed(x_in), directions = packed(directions_in), coef = packed(coef_in);
  const Arguments given("add_directions", x);
  const Rows rows = given.x();
  const int64_t F = directions.dim() == 2 ? directions.size(0) : 0;
  const Rows added = given.directions(directions, F);
  const Values terms = given.values("coef", coef, F);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  cpu::add(rows, tokens_of(x), added, F, terms, given.into(y));
  return y;
}

Tensor project(const Tensor& x_in, const Tensor& W_enc, const Tensor& b_enc) {
  const Tensor x = packed(x_in);
  const Arguments given("project", x);
  const Rows rows = given.x();
  const Encoder encoder = given.encoder(W_enc, b_enc, 1);
  Tensor p = torch::stable::new_empty(x, like_tokens(x, encoder.count), ScalarType::Float);
  cpu::project(rows, tokens_of(x), encoder.W, encoder.count, encoder.bias,
               static_cast<float*>(p.mutable_data_ptr()));
  return p;
}

Tensor feature_acts(const Tensor& x_in, const Tensor& W_enc, const Tensor& b_enc,
                    const Tensor& features_in, int64_t k, std::optional<Tensor> order) {
  const Tensor x = packed(x_in), features = packed(features_in);
  const Arguments given("feature_acts", x);
  const Rows rows = given.x();
  const Encoder encoder = given.encoder(W_enc, b_enc, k, order);
  const Features chosen = checked("feature_acts", given.features(features), encoder.count);
  Tensor acts = torch::stable::new_empty(x, like_tokens(x, chosen.count), ScalarType::Float);
  auto* out = static_cast<float*>(acts.mutable_data_ptr());
  cpu::measure(rows, tokens_of(x), encoder, chosen, nullptr, {}, [&](int64_t t, const float* a) {
    std::copy(a, a + chosen.count, out + t * chosen.count);
  });
  return acts;
}

std::tuple<Tensor, Tensor> encode(const Tensor& x_in, const Tensor& W_enc, const Tensor& b_enc,
                                  int64_t k) {
  const Tensor x = packed(x_in);
  const Arguments given("encode", x);
  const Rows rows = given.x();
  const Encoder encoder = given.encoder(W_enc, b_enc, k);
  Tensor values = torch::stable::new_empty(x, like_tokens(x, k), ScalarType::Float);
  Tensor indices = torch::stable::new_empty(x, like_tokens(x, k), ScalarType::Long);
  cpu::encode(rows, tokens_of(x), encoder, static_cast<float*>(values.mutable_data_ptr()),
              static_cast<int64_t*>(indices.mutable_data_ptr()));
  return {values, indices};
}

Tensor decode(const Tensor& values_in, const Tensor& indices_in, const Tensor& W_dec,
              const Tensor& b_dec_in) {
  const Tensor values = packed(values_in), indices = packed(indices_in);
  const Arguments given("decode", values, "values");
  const float* weights = given.weights();
  const int64_t* index = given.indices(indices);
  const Rows rows = given.decoder(W_dec, b_dec_in);
  const Tensor b_dec = packed(torch::stable::to(b_dec_in, ScalarType::Float));
  check_indices("decode", "indices", index, indices.numel(), W_dec.size(0));

  Tensor y =
      torch::stable::new_empty(W_dec, like_tokens(values, rows.width), promoted(W_dec, b_dec_in));
  cpu::decode(weights, index, tokens_of(values), values.size(-1), rows,
              static_cast<const float*>(b_dec.const_data_ptr()), given.into(y));
  return y;
}

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

STABLE_TORCH_LIBRARY_IMPL(saesteer, CPU, m) {
  m.impl("steer", TORCH_BOX(&saesteer::steer));
  m.impl("steer_", TORCH_BOX(&saesteer::steer_));
  m.impl("feature_acts", TORCH_BOX(&saesteer::feature_acts));
  m.impl("project", TORCH_BOX(&saesteer::project));
  m.impl("add_directions", TORCH_BOX(&saesteer::add_directions));
  m.impl("encode", TORCH_BOX(&saesteer::encode));
  m.impl("decode", TORCH_BOX(&saesteer::decode));
}
