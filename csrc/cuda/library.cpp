// The ops for CUDA tensors: memory from PyTorch, and a call of kernels.h on the current stream.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "calls.h"
#include "cuda/kernels.h"

namespace saesteer {
namespace {

// Makes x's device the current one while it lives, and knows its stream.
class Cuda {
 public:
  Cuda(const char* op, const char* name, const Tensor& x) : x_(x), guard_(index(op, name, x)) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
  }

  Encoder checked(const char* op, const Encoder& encoder) const {
    check(encoder.count < int64_t{1} << 31, op, "W_enc has ", encoder.count,
          " rows; accepted on CUDA: fewer than 2^31");
    return encoder;
  }

  Features checked(const char* op, const Features& features, int64_t) const {
    const int64_t most = cuda::most_features();
    check(features.count <= most, op, "features names ", features.count,
          " latents; accepted on this device: at most ", most);
    return features;
  }

  // Only the device may read them: kernels.h says what comes of bad ones.
  void check_indices(const char*, const char*, const int64_t*, int64_t, int64_t) const {}

  void steer(const Rows& x, int64_t tokens, const Encoder& encoder, const Rows& directions,
             const Features& features, const Values& values, const bool* mask,
             const OutRows& y) const {
    Tensor work = workspace(cuda::ladder_workspace(tokens, features.count));
    cuda::steer(x, tokens, encoder, directions, features, values, mask, y, written<void>(work),
                stream_);
  }

  void feature_acts(const Rows& x, int64_t tokens, const Encoder& encoder, const Features& features,
                    float* acts) const {
    Tensor work = workspace(cuda::ladder_workspace(tokens, features.count));
    cuda::feature_acts(x, tokens, encoder, features, acts, written<void>(work), stream_);
  }

  void project(const Rows& x, int64_t tokens, const Rows& rows, int64_t count, const float* bias,
               float* p) const {
    cuda::project(x, tokens, rows, count, bias, p, stream_);
  }

  void add_directions(const Rows& x, int64_t tokens, const Rows& directions, int64_t features,
                      const Values& coef, const OutRows& y) const {
    cuda::add_directions(x, tokens, directions, features, coef, y, stream_);
  }

  void encode(const Rows& x, int64_t tokens, const Encoder& encoder, float* values,
              int64_t* indices) const {
    Tensor work = workspace(cuda::encode_workspace(tokens, encoder));
    cuda::encode(x, tokens, encoder, values, indices, written<void>(work), stream_);
  }

  void decode(const float* values, const int64_t* indices, int64_t tokens, int64_t k,
              const Rows& W_dec, int64_t latents, const float* b_dec, const OutRows& y) const {
    cuda::decode(values, indices, tokens, k, W_dec, latents, b_dec, y, stream_);
  }

 private:
  // One argument on a GPU is enough for the call to come here.
  static int32_t index(const char* op, const char* name, const Tensor& x) {
    check(x.is_cuda(), op, name, " is not on a GPU, where other arguments are; move it there");
    return x.get_device_index();
  }

  // Freed memory is used again on its own stream only, so it may be freed before the kernels end.
  Tensor workspace(int64_t bytes) const {
    return torch::stable::new_empty(x_, {bytes}, ScalarType::Byte);
  }

  const Tensor& x_;
  const torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace
}  // namespace saesteer

STABLE_TORCH_LIBRARY_IMPL(saesteer_cuda, CUDA, m) { saesteer::implement<saesteer::Cuda>(m); }
