// The ops: their schemas, the checks of their arguments, and their registration for the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <unordered_set>
#include <vector>

#include "cpu/encode.h"
#include "cpu/project.h"
#include "cpu/steer.h"

namespace saesteer {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
void check(bool holds, const char* op, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  message << "saesteer::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

std::string dtype_name(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Bool:
      return "bool";
    default:
      return "dtype number " + std::to_string(static_cast<int>(t.scalar_type()));
  }
}

std::string shape(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

// Names of what is checked: the op, and one of its arguments.
struct Argument {
  const char* op;
  const char* name;
  const Tensor& t;

  void on_cpu() const {
    check(t.is_cpu(), op, name, " is not on the CPU, where x is; move it to x's device");
  }
  void has_dtype(ScalarType wanted, const char* wanted_name) const {
    check(t.scalar_type() == wanted, op, name, " is ", dtype_name(t), "; accepted: ", wanted_name);
  }
  void has_shape(const std::string& wanted, bool holds) const {
    check(holds, op, name, " has shape ", shape(t), "; accepted: ", wanted);
  }
  cpu::Dtype float_dtype() const {
    switch (t.scalar_type()) {
      case ScalarType::Float:
        return cpu::Dtype::f32;
      case ScalarType::BFloat16:
        return cpu::Dtype::bf16;
      case ScalarType::Half:
        return cpu::Dtype::f16;
      default:
        check(false, op, name, " is ", dtype_name(t), "; accepted: float32, bfloat16, float16");
    }
    return cpu::Dtype::f32;
  }
};

int64_t tokens_of(const Tensor& x) {
  int64_t tokens = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) tokens *= x.size(i);
  return tokens;
}

// x's leading sizes, then `last` unless it is -1.
std::vector<int64_t> like_tokens(const Tensor& x, int64_t last) {
  const auto sizes = x.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end() - 1);
  if (last >= 0) shape.push_back(last);
  return shape;
}

bool has_sizes(const Tensor& t, const std::vector<int64_t>& sizes) {
  const auto have = t.sizes();
  return std::vector<int64_t>(have.begin(), have.end()) == sizes;
}

Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

cpu::Rows rows_of(const Argument& a) {
  return {a.t.const_data_ptr(), a.float_dtype(), a.t.size(a.t.dim() - 1)};
}

cpu::Rows checked_x(const char* op, const Tensor& x) {
  const Argument a{op, "x", x};
  a.has_shape("[..., d]", x.dim() >= 1);
  return rows_of(a);
}

cpu::Encoder checked_encoder(const char* op, const Tensor& x, const Tensor& W_enc,
                             const Tensor& b_enc, int64_t k) {
  const Argument w{op, "W_enc", W_enc}, b{op, "b_enc", b_enc};
  w.on_cpu();
  b.on_cpu();
  const int64_t d = x.size(x.dim() - 1);
  w.has_shape("[N, " + std::to_string(d) + "], a latent a row, as wide as x",
              W_enc.dim() == 2 && W_enc.size(1) == d && W_enc.size(0) >= 1);
  const int64_t N = W_enc.size(0);
  check(W_enc.is_contiguous(), op,
        "W_enc is not contiguous; a copy of it every call would cost more than the op: call "
        ".contiguous() once");
  b.has_dtype(ScalarType::Float,
              "float32 (with W_enc @ b_dec already subtracted, if the SAE does)");
  b.has_shape("[" + std::to_string(N) + "], contiguous",
              b_enc.dim() == 1 && b_enc.size(0) == N && b_enc.is_contiguous());
  check(k >= 1 && k <= N, op, "k is ", k, "; accepted: 1 to ", N, ", the number of latents");
  return {rows_of(w), static_cast<const float*>(b_enc.const_data_ptr()), N, k};
}

// `features` must be contiguous.
cpu::Features checked_features(const char* op, const Tensor& features, int64_t N) {
  const Argument a{op, "features", features};
  a.on_cpu();
  a.has_dtype(ScalarType::Long, "int64");
  a.has_shape("[F]", features.dim() == 1);
  const auto* index = static_cast<const int64_t*>(features.const_data_ptr());
  const int64_t F = features.size(0);
  std::unordered_set<int64_t> seen;
  for (int64_t f = 0; f < F; ++f) {
    check(index[f] >= 0 && index[f] < N, op, "features holds ", index[f], "; accepted: 0 to ",
          N - 1);
    if (F > 1)
      check(seen.insert(index[f]).second, op, "features holds ", index[f],
            " twice; a latent can be edited once");
  }
  return {index, F};
}

// `directions` and `values` must be contiguous.
cpu::Rows checked_directions(const char* op, const Tensor& directions, int64_t F, int64_t d) {
  const Argument a{op, "directions", directions};
  a.on_cpu();
  a.has_shape("[F, d], a row of W_dec a feature", has_sizes(directions, {F, d}));
  return rows_of(a);
}

cpu::Values checked_values(const char* op, const char* name, const Tensor& values, const Tensor& x,
                           int64_t F) {
  const Argument a{op, name, values};
  a.on_cpu();
  a.has_dtype(ScalarType::Float, "float32");
  const bool shared = has_sizes(values, {F});
  a.has_shape("[F], or x's leading sizes and F", shared || has_sizes(values, like_tokens(x, F)));
  return {static_cast<const float*>(values.const_data_ptr()), shared ? 0 : F};
}

Tensor steer(const Tensor& x_in, const Tensor& W_enc, const Tensor& b_enc,
             const Tensor& directions_in, const Tensor& features_in, const Tensor& values_in,
             int64_t k, std::optional<Tensor> mask_in) {
  const char* op = "steer";
  const Tensor x = packed(x_in), features = packed(features_in), directions = packed(directions_in),
               values = packed(values_in);
  const cpu::Rows rows = checked_x(op, x);
  const cpu::Encoder encoder = checked_encoder(op, x, W_enc, b_enc, k);
  const cpu::Features chosen = checked_features(op, features, encoder.count);

  const cpu::Rows added = checked_directions(op, directions, chosen.count, rows.width);
  const cpu::Values held = checked_values(op, "values", values, x, chosen.count);

  Tensor mask;
  if (mask_in) {
    mask = packed(*mask_in);
    const Argument m{op, "mask", mask};
    m.on_cpu();
    m.has_dtype(ScalarType::Bool, "bool");
    m.has_shape("x's leading sizes", has_sizes(mask, like_tokens(x, -1)));
  }

  Tensor y = torch::stable::new_empty(x, x.sizes());
  cpu::steer(rows, tokens_of(x), encoder, added, chosen, held,
             mask_in ? static_cast<const bool*>(mask.const_data_ptr()) : nullptr,
             {y.mutable_data_ptr(), rows.dtype, rows.width});
  return y;
}

Tensor add_directions(const Tensor& x_in, const Tensor& directions_in, const Tensor& coef_in) {
  const char* op = "add_directions";
  const Tensor x = packed(x_in), directions = packed(directions_in), coef = packed(coef_in);
  const cpu::Rows rows = checked_x(op, x);
  const int64_t F = directions.dim() == 2 ? directions.size(0) : 0;
  const cpu::Rows added = checked_directions(op, directions, F, rows.width);
  const cpu::Values terms = checked_values(op, "coef", coef, x, F);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  cpu::add(rows, tokens_of(x), added, F, terms, {y.mutable_data_ptr(), rows.dtype, rows.width});
  return y;
}

Tensor project(const Tensor& x_in, const Tensor& W_enc, const Tensor& b_enc) {
  const char* op = "project";
  const Tensor x = packed(x_in);
  const cpu::Rows rows = checked_x(op, x);
  const cpu::Encoder encoder = checked_encoder(op, x, W_enc, b_enc, 1);
  Tensor p = torch::stable::new_empty(x, like_tokens(x, encoder.count), ScalarType::Float);
  cpu::project(rows, tokens_of(x), encoder.W, encoder.count, encoder.bias,
               static_cast<float*>(p.mutable_data_ptr()));
  return p;
}

Tensor feature_acts(const Tensor& x_in, const Tensor& W_enc, const Tensor& b_enc,
                    const Tensor& features_in, int64_t k) {
  const char* op = "feature_acts";
  const Tensor x = packed(x_in), features = packed(features_in);
  const cpu::Rows rows = checked_x(op, x);
  const cpu::Encoder encoder = checked_encoder(op, x, W_enc, b_enc, k);
  const cpu::Features chosen = checked_features(op, features, encoder.count);
  Tensor acts = torch::stable::new_empty(x, like_tokens(x, chosen.count), ScalarType::Float);
  auto* out = static_cast<float*>(acts.mutable_data_ptr());
  cpu::measure(rows, tokens_of(x), encoder, chosen, nullptr, [&](int64_t t, const float* a) {
    std::copy(a, a + chosen.count, out + t * chosen.count);
  });
  return acts;
}

std::tuple<Tensor, Tensor> encode(const Tensor& x_in, const Tensor& W_enc, const Tensor& b_enc,
                                  int64_t k) {
  const char* op = "encode";
  const Tensor x = packed(x_in);
  const cpu::Rows rows = checked_x(op, x);
  const cpu::Encoder encoder = checked_encoder(op, x, W_enc, b_enc, k);
  Tensor values = torch::stable::new_empty(x, like_tokens(x, k), ScalarType::Float);
  Tensor indices = torch::stable::new_empty(x, like_tokens(x, k), ScalarType::Long);
  cpu::encode(rows, tokens_of(x), encoder, static_cast<float*>(values.mutable_data_ptr()),
              static_cast<int64_t*>(indices.mutable_data_ptr()));
  return {values, indices};
}

Tensor decode(const Tensor& values_in, const Tensor& indices_in, const Tensor& W_dec,
              const Tensor& b_dec_in) {
  const char* op = "decode";
  const Tensor values = packed(values_in), indices = packed(indices_in);
  const Argument v{op, "values", values}, i{op, "indices", indices}, w{op, "W_dec", W_dec};
  v.has_dtype(ScalarType::Float, "float32");
  v.has_shape("[..., k]", values.dim() >= 1);
  i.on_cpu();
  i.has_dtype(ScalarType::Long, "int64");
  i.has_shape("values' shape", has_sizes(indices, like_tokens(values, values.size(-1))));
  w.on_cpu();
  w.has_shape("[N, d], a latent a row", W_dec.dim() == 2);
  check(W_dec.is_contiguous(), op, "W_dec is not contiguous: call .contiguous() once");
  const Argument b{op, "b_dec", b_dec_in};
  b.on_cpu();
  b.float_dtype();
  b.has_shape("[d], as wide as W_dec", has_sizes(b_dec_in, {W_dec.size(1)}));
  const Tensor b_dec = packed(torch::stable::to(b_dec_in, ScalarType::Float));

  const auto* index = static_cast<const int64_t*>(indices.const_data_ptr());
  for (int64_t n = 0; n < indices.numel(); ++n)
    check(index[n] >= 0 && index[n] < W_dec.size(0), op, "indices holds ", index[n],
          "; accepted: 0 to ", W_dec.size(0) - 1);
  const cpu::Rows rows = rows_of(w);
  Tensor y = torch::stable::new_empty(W_dec, like_tokens(values, rows.width));
  cpu::decode(static_cast<const float*>(values.const_data_ptr()), index, tokens_of(values),
              values.size(-1), rows, static_cast<const float*>(b_dec.const_data_ptr()),
              {y.mutable_data_ptr(), rows.dtype, rows.width});
  return y;
}

}  // namespace
}  // namespace saesteer

STABLE_TORCH_LIBRARY(saesteer, m) {
  m.def(
      "steer(Tensor x, Tensor W_enc, Tensor b_enc, Tensor directions, Tensor features, "
      "Tensor values, int k, Tensor? mask=None) -> Tensor");
  m.def("feature_acts(Tensor x, Tensor W_enc, Tensor b_enc, Tensor features, int k) -> Tensor");
  m.def("project(Tensor x, Tensor W_enc, Tensor b_enc) -> Tensor");
  m.def("add_directions(Tensor x, Tensor directions, Tensor coef) -> Tensor");
  m.def("encode(Tensor x, Tensor W_enc, Tensor b_enc, int k) -> (Tensor values, Tensor indices)");
  m.def("decode(Tensor values, Tensor indices, Tensor W_dec, Tensor b_dec) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(saesteer, CPU, m) {
  m.impl("steer", TORCH_BOX(&saesteer::steer));
  m.impl("feature_acts", TORCH_BOX(&saesteer::feature_acts));
  m.impl("project", TORCH_BOX(&saesteer::project));
  m.impl("add_directions", TORCH_BOX(&saesteer::add_directions));
  m.impl("encode", TORCH_BOX(&saesteer::encode));
  m.impl("decode", TORCH_BOX(&saesteer::decode));
}
