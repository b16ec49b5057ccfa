// The ops for CUDA tensors: the checks that every device makes, memory from PyTorch, and a call of
// kernels.h on the current stream.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "checks.h"
#include "cuda/kernels.h"

namespace saesteer {
namespace {

// Makes x's device the current one while it lives, and knows its stream.
class Device {
 public:
  Device(const char* op, const char* name, const Tensor& x) : guard_(index(op, name, x)) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  // One argument on a GPU is enough for the call to come here.
  static int32_t index(const char* op, const char* name, const Tensor& x) {
    check(x.is_cuda(), op, name, " is not on a GPU, where other arguments are; move it there");
    return x.get_device_index();
  }

  const torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// Freed memory is used again on its own stream only, so it may be freed before the kernels end.
Tensor workspace(const Tensor& x, int64_t bytes) {
  return torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
}

Encoder checked(const char* op, const Encoder& encoder) {
  check(encoder.count < int64_t{1} << 31, op, "W_enc has ", encoder.count,
        " rows; accepted on CUDA: fewer than 2^31");
  return encoder;
}

Features checked(const char* op, const Features& features) {
  const int64_t most = cuda::most_features();
  check(features.count <= most, op, "features names ", features.count,
        " latents; accepted on this device: at most ", most);
  return features;
}

// Writes y, which may be x.
void steer_to(const char* op, const Device& device, const Tensor& x, const Tensor& W_enc,
              const Tensor& b_enc, const Tensor& directions_in, const Tensor& features_in,
              const Tensor& values_in, int64_t k, const std::optional<Tensor>& mask_in,
              const std::optional<Tensor>& order, Tensor& y) {
  const Tensor features = packed(features_in), directions = packed(directions_in),
               values = packed(values_in), mask = mask_in ? packed(*mask_in) : Tensor();
  const Arguments given(op, x);
  const Rows rows = given.x();
  const Encoder encoder = checked(op, given.encoder(W_enc, b_enc, k, order));
  const Features chosen = checked(op, given.features(features));
  const Rows added = given.directions(directions, chosen.count);
  const Values held = given.values("values", values, chosen.count);
  const bool* steered = mask_in ? given.mask(mask) : nullptr;

  const int64_t tokens = tokens_of(x);
  Tensor work = workspace(x, cuda::ladder_workspace(tokens, chosen.count));
  cuda::steer(rows, tokens, encoder, added, chosen, held, steered, given.into(y),
              work.mutable_data_ptr(), device.stream());
}

Tensor steer(const Tensor& x_in, const Tensor& W_enc, const Tensor& b_enc, const Tensor& directions,
             const Tensor& features, const Tensor& values, int64_t k, std::optional<Tensor> mask,
             std::optional<Tensor> order) {
  const Device device("steer", "x", x_in);
  const Tensor x = packed(x_in);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  steer_to("steer", device, x, W_enc, b_enc, directions, features, values, k, mask, order, y);
  return y;
}

void steer_(Tensor x, const Tensor& W_enc, const Tensor& b_enc, const Tensor& directions,
            const Tensor& features, const Tensor& values, int64_t k, std::optional<Tensor> mask,
            std::optional<Tensor> order) {
  const Device device("steer_", "x", x);
  Arguments("steer_", x).overwrites(W_enc, b_enc, directions, features, values, mask, order);
  steer_to("steer_", device, x, W_enc, b_enc, directions, features, values, k, mask, order, x);
}

Tensor feature_acts(const Tensor& x_in, const Tensor& W_enc, const Tensor& b_enc,
                    const Tensor& features_in, int64_t k, std::optional<Tensor> order) {
  const Device device("feature_acts", "x", x_in);
  const Tensor x = packed(x_in), features = packed(features_in);
  const Arguments given("feature_acts", x);
  const Rows rows = given.x();
  const Encoder encoder = checked("feature_acts", given.encoder(W_enc, b_enc, k, order));
  const Features chosen = checked("feature_acts", given.features(features));

  const int64_t tokens = tokens_of(x);
  Tensor acts = torch::stable::new_empty(x, like_tokens(x, chosen.count), ScalarType::Float);
  Tensor work = workspace(x, cuda::ladder_workspace(tokens, chosen.count));
  cuda::feature_acts(rows, tokens, encoder, chosen, static_cast<float*>(acts.mutable_data_ptr()),
                     work.mutable_data_ptr(), device.stream());
  return acts;
}

Tensor project(const Tensor& x_in, const Tensor& W_enc, const Tensor& b_enc) {
  const Device device("project", "x", x_in);
  const Tensor x = packed(x_in);
  const Arguments given("project", x);
  const Rows rows = given.x();
  const Encoder encoder = given.encoder(W_enc, b_enc, 1);
  Tensor p = torch::stable::new_empty(x, like_tokens(x, encoder.count), ScalarType::Float);
  cuda::project(rows, tokens_of(x), encoder.W, encoder.count, encoder.bias,
                static_cast<float*>(p.mutable_data_ptr()), device.stream());
  return p;
}

Tensor add_directions(const Tensor& x_in, const Tensor& directions_in, const Tensor& coef_in) {
  const Device device("add_directions", "x", x_in);
  const Tensor x = packed(x_in), directions = packed(directions_in), coef = packed(coef_in);
  const Arguments given("add_directions", x);
  const Rows rows = given.x();
  const int64_t F = directions.dim() == 2 ? directions.size(0) : 0;
  const Rows added = given.directions(directions, F);
  const Values terms = given.values("coef", coef, F);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  cuda::add_directions(rows, tokens_of(x), added, F, terms, given.into(y), device.stream());
  return y;
}

std::tuple<Tensor, Tensor> encode(const Tensor& x_in, const Tensor& W_enc, const Tensor& b_enc,
                                  int64_t k) {
  const Device device("encode", "x", x_in);
  const Tensor x = packed(x_in);
  const Arguments given("encode", x);
  const Rows rows = given.x();
  const Encoder encoder = checked("encode", given.encoder(W_enc, b_enc, k));

  const int64_t tokens = tokens_of(x);
  Tensor values = torch::stable::new_empty(x, like_tokens(x, k), ScalarType::Float);
  Tensor indices = torch::stable::new_empty(x, like_tokens(x, k), ScalarType::Long);
  Tensor work = workspace(x, cuda::encode_workspace(tokens, encoder));
  cuda::encode(rows, tokens, encoder, static_cast<float*>(values.mutable_data_ptr()),
               static_cast<int64_t*>(indices.mutable_data_ptr()), work.mutable_data_ptr(),
               device.stream());
  return {values, indices};
}

Tensor decode(const Tensor& values_in, const Tensor& indices_in, const Tensor& W_dec,
              const Tensor& b_dec_in) {
  const Device device("decode", "values", values_in);
  const Tensor values = packed(values_in), indices = packed(indices_in);
  const Arguments given("decode", values, "values");
  const float* weights = given.weights();
  const int64_t* index = given.indices(indices);
  const Rows rows = given.decoder(W_dec, b_dec_in);
  const Tensor b_dec = packed(torch::stable::to(b_dec_in, ScalarType::Float));

  Tensor y =
      torch::stable::new_empty(W_dec, like_tokens(values, rows.width), promoted(W_dec, b_dec_in));
  cuda::decode(weights, index, tokens_of(values), values.size(-1), rows, W_dec.size(0),
               static_cast<const float*>(b_dec.const_data_ptr()), given.into(y), device.stream());
  return y;
}

}  // namespace
}  // namespace saesteer

STABLE_TORCH_LIBRARY_IMPL(saesteer_cuda, CUDA, m) {
  m.impl("steer", TORCH_BOX(&saesteer::steer));
  m.impl("steer_", TORCH_BOX(&saesteer::steer_));
  m.impl("feature_acts", TORCH_BOX(&saesteer::feature_acts));
  m.impl("project", TORCH_BOX(&saesteer::project));
  m.impl("add_directions", TORCH_BOX(&saesteer::add_directions));
  m.impl("encode", TORCH_BOX(&saesteer::encode));
  m.impl("decode", TORCH_BOX(&saesteer::decode));
}
