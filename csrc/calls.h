// The ops' calls, the same for every device: arguments are checked, results made, kernels called.
//
// A Backend is made for one call, from the op's name and its first argument:
//   checked(op, encoder), checked(op, features, N), check_indices(op, name, index, count, N)
//                       what it asks of arguments beyond checks.h
//   steer, feature_acts, project, add_directions, encode, decode
//                       its kernels, over views
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "checks.h"

namespace saesteer {

template <class T>
T* written(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class Backend>
struct Calls {
  // Writes y, which may be x.
  static void steer_to(const char* op, const Backend& backend, const Tensor& x, const Tensor& W_enc,
                       const Tensor& b_enc, const Tensor& directions_in, const Tensor& features_in,
                       const Tensor& values_in, int64_t k, const std::optional<Tensor>& mask_in,
                       const std::optional<Tensor>& order, Tensor& y) {
    const Tensor features = packed(features_in), directions = packed(directions_in),
                 values = packed(values_in), mask = mask_in ? packed(*mask_in) : Tensor();
    const Arguments given(op, x);
    const Rows rows = given.x();
    const Encoder encoder = backend.checked(op, given.encoder(W_enc, b_enc, k, order));
    const Features chosen = backend.checked(op, given.features(features), encoder.count);
    const Rows added = given.directions(directions, chosen.count);
    const Values held = given.values("values", values, chosen.count);
    const bool* steered = mask_in ? given.mask(mask) : nullptr;
    backend.steer(rows, tokens_of(x), encoder, added, chosen, held, steered, given.into(y));
  }

  static Tensor steer(const Tensor& x_in, const Tensor& W_enc, const Tensor& b_enc,
                      const Tensor& directions, const Tensor& features, const Tensor& values,
                      int64_t k, std::optional<Tensor> mask, std::optional<Tensor> order) {
    const Backend backend("steer", "x", x_in);
    const Tensor x = packed(x_in);
    Tensor y = torch::stable::new_empty(x, x.sizes());
    steer_to("steer", backend, x, W_enc, b_enc, directions, features, values, k, mask, order, y);
    return y;
  }

  static void steer_(Tensor x, const Tensor& W_enc, const Tensor& b_enc, const Tensor& directions,
                     const Tensor& features, const Tensor& values, int64_t k,
                     std::optional<Tensor> mask, std::optional<Tensor> order) {
    const Backend backend("steer_", "x", x);
    Arguments("steer_", x).overwrites(W_enc, b_enc, directions, features, values, mask, order);
    steer_to("steer_", backend, x, W_enc, b_enc, directions, features, values, k, mask, order, x);
  }

  static Tensor feature_acts(const Tensor& x_in, const Tensor& W_enc, const Tensor& b_enc,
                             const Tensor& features_in, int64_t k, std::optional<Tensor> order) {
    const Backend backend("feature_acts", "x", x_in);
    const Tensor x = packed(x_in), features = packed(features_in);
    const Arguments given("feature_acts", x);
    const Rows rows = given.x();
    const Encoder encoder = backend.checked("feature_acts", given.encoder(W_enc, b_enc, k, order));
    const Features chosen =
        backend.checked("feature_acts", given.features(features), encoder.count);
    Tensor acts = torch::stable::new_empty(x, like_tokens(x, chosen.count), ScalarType::Float);
    backend.feature_acts(rows, tokens_of(x), encoder, chosen, written<float>(acts));
    return acts;
  }

  static Tensor project(const Tensor& x_in, const Tensor& W_enc, const Tensor& b_enc) {
    const Backend backend("project", "x", x_in);
    const Tensor x = packed(x_in);
    const Arguments given("project", x);
    const Rows rows = given.x();
    const Encoder encoder = given.encoder(W_enc, b_enc, 1);
    Tensor p = torch::stable::new_empty(x, like_tokens(x, encoder.count), ScalarType::Float);
    backend.project(rows, tokens_of(x), encoder.W, encoder.count, encoder.bias, written<float>(p));
    return p;
  }

  static Tensor add_directions(const Tensor& x_in, const Tensor& directions_in,
                               const Tensor& coef_in) {
    const Backend backend("add_directions", "x", x_in);
    const Tensor x = packed(x_in), directions = packed(directions_in), coef = packed(coef_in);
    const Arguments given("add_directions", x);
    const Rows rows = given.x();
    const int64_t F = directions.dim() == 2 ? directions.size(0) : 0;
    const Rows added = given.directions(directions, F);
    const Values terms = given.values("coef", coef, F);
    Tensor y = torch::stable::new_empty(x, x.sizes());
    backend.add_directions(rows, tokens_of(x), added, F, terms, given.into(y));
    return y;
  }

  static std::tuple<Tensor, Tensor> encode(const Tensor& x_in, const Tensor& W_enc,
                                           const Tensor& b_enc, int64_t k) {
    const Backend backend("encode", "x", x_in);
    const Tensor x = packed(x_in);
    const Arguments given("encode", x);
    const Rows rows = given.x();
    const Encoder encoder = backend.checked("encode", given.encoder(W_enc, b_enc, k));
    Tensor values = torch::stable::new_empty(x, like_tokens(x, k), ScalarType::Float);
    Tensor indices = torch::stable::new_empty(x, like_tokens(x, k), ScalarType::Long);
    backend.encode(rows, tokens_of(x), encoder, written<float>(values), written<int64_t>(indices));
    return {values, indices};
  }

  static Tensor decode(const Tensor& values_in, const Tensor& indices_in, const Tensor& W_dec,
                       const Tensor& b_dec_in) {
    const Backend backend("decode", "values", values_in);
    const Tensor values = packed(values_in), indices = packed(indices_in);
    const Arguments given("decode", values, "values");
    const float* weights = given.weights();
    const int64_t* index = given.indices(indices);
    const Rows rows = given.decoder(W_dec, b_dec_in);
    const Tensor b_dec = packed(torch::stable::to(b_dec_in, ScalarType::Float));
    backend.check_indices("decode", "indices", index, indices.numel(), W_dec.size(0));

    Tensor y =
        torch::stable::new_empty(W_dec, like_tokens(values, rows.width), promoted(W_dec, b_dec_in));
    backend.decode(weights, index, tokens_of(values), values.size(-1), rows, W_dec.size(0),
                   static_cast<const float*>(b_dec.const_data_ptr()), given.into(y));
    return y;
  }
};

// Registers them, in STABLE_TORCH_LIBRARY_IMPL.
template <class Backend, class Library>
void implement(Library& m) {
  using Ops = Calls<Backend>;
  m.impl("steer", TORCH_BOX(&Ops::steer));
  m.impl("steer_", TORCH_BOX(&Ops::steer_));
  m.impl("feature_acts", TORCH_BOX(&Ops::feature_acts));
  m.impl("project", TORCH_BOX(&Ops::project));
  m.impl("add_directions", TORCH_BOX(&Ops::add_directions));
  m.impl("encode", TORCH_BOX(&Ops::encode));
  m.impl("decode", TORCH_BOX(&Ops::decode));
}

}  // namespace saesteer
