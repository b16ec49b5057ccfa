// The checks of the ops' arguments, which every device makes, and the views that pass them on.
// Nothing here reads a tensor's elements: they may be on a GPU. What runs no C++ is checked, in the
// same words, by saesteer_fast/checks.py.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "views.h"

namespace saesteer {

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

inline std::string dtype_name(const Tensor& t) {
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
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    case ScalarType::Float8_e5m2:
      return "float8_e5m2";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    default:
      return "dtype number " + std::to_string(static_cast<int>(t.scalar_type()));
  }
}

inline std::string shape(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

inline std::string place(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "another device";
}

// Names of what is checked: the op, and one of its arguments.
struct Argument {
  const char* op;
  const char* name;
  const Tensor& t;

  void is_with(const Argument& first) const {
    const bool there = first.t.is_cpu() ? t.is_cpu()
                                        : t.is_cuda() && first.t.is_cuda() &&
                                              t.get_device_index() == first.t.get_device_index();
    check(there, op, name, " is on ", place(t), ", ", first.name, " on ", place(first.t),
          "; move one to the other");
  }
  void has_dtype(ScalarType wanted, const char* wanted_name) const {
    check(t.scalar_type() == wanted, op, name, " is ", dtype_name(t), "; accepted: ", wanted_name);
  }
  void has_shape(const std::string& wanted, bool holds) const {
    check(holds, op, name, " has shape ", shape(t), "; accepted: ", wanted);
  }
  void is_contiguous() const {
    check(t.is_contiguous(), op, name,
          " is not contiguous; a copy of it every call would cost more than the op: call "
          ".contiguous() once");
  }
  Dtype float_dtype() const {
    switch (t.scalar_type()) {
      case ScalarType::Float:
        return Dtype::f32;
      case ScalarType::BFloat16:
        return Dtype::bf16;
      case ScalarType::Half:
        return Dtype::f16;
      default:
        check(false, op, name, " is ", dtype_name(t), "; accepted: float32, bfloat16, float16");
    }
    return Dtype::f32;
  }
};

inline int64_t tokens_of(const Tensor& x) {
  int64_t tokens = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) tokens *= x.size(i);
  return tokens;
}

// x's leading sizes, then `last` unless it is -1.
inline std::vector<int64_t> like_tokens(const Tensor& x, int64_t last) {
  const auto sizes = x.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end() - 1);
  if (last >= 0) shape.push_back(last);
  return shape;
}

// What decode gives: W_dec's and b_dec's dtype, or fp32 where they differ.
inline ScalarType promoted(const Tensor& W_dec, const Tensor& b_dec) {
  const ScalarType dtype = W_dec.scalar_type();
  return dtype == b_dec.scalar_type() ? dtype : ScalarType::Float;
}

inline bool has_sizes(const Tensor& t, const std::vector<int64_t>& sizes) {
  const auto have = t.sizes();
  return std::vector<int64_t>(have.begin(), have.end()) == sizes;
}

// From the first byte of t to behind its last; {0, 0} if there is none.
inline std::pair<uintptr_t, uintptr_t> extent(const Tensor& t) {
  if (t.numel() == 0) return {0, 0};
  const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  int64_t elements = 1;
  for (int64_t i = 0; i < t.dim(); ++i) elements += (t.size(i) - 1) * t.stride(i);
  return {begin, begin + elements * t.element_size()};
}

inline Tensor packed(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// The arguments of one call, by name. Each method checks one and gives its view; what is not
// required to be contiguous must be packed first.
class Arguments {
 public:
  // `x` lends the others its device, its leading sizes and its width.
  Arguments(const char* op, const Tensor& x, const char* name = "x") : x_{op, name, x} {}

  Rows x() const {
    x_.has_shape("[..., d]", x_.t.dim() >= 1);
    return rows(x_);
  }

  // For steer_, which overwrites x while it reads the others.
  void overwrites(const Tensor& W_enc, const Tensor& b_enc, const Tensor& directions,
                  const Tensor& features, const Tensor& values, const std::optional<Tensor>& mask,
                  const std::optional<Tensor>& order) const {
    check(x_.t.is_contiguous(), x_.op,
          "x is not contiguous, and is overwritten where it lies; accepted: a contiguous x, or "
          "saesteer::steer, which takes any");
    const auto [begin, end] = extent(x_.t);
    const std::pair<const char*, const Tensor*> others[] = {{"W_enc", &W_enc},
                                                            {"b_enc", &b_enc},
                                                            {"directions", &directions},
                                                            {"features", &features},
                                                            {"values", &values},
                                                            {"mask", mask ? &*mask : nullptr},
                                                            {"order", order ? &*order : nullptr}};
    for (const auto& [name, t] : others) {
      const auto [first, behind] = t ? extent(*t) : std::pair<uintptr_t, uintptr_t>();
      check(behind <= begin || end <= first, x_.op, name,
            " lies in the memory of x, which is overwritten; accepted: a copy of it");
    }
  }

  Encoder encoder(const Tensor& W_enc, const Tensor& b_enc, int64_t k,
                  const std::optional<Tensor>& order = {}) const {
    const Argument w = named("W_enc", W_enc), b = named("b_enc", b_enc);
    const int64_t d = x_.t.size(x_.t.dim() - 1);
    w.has_shape("[N, " + std::to_string(d) + "], a latent a row, as wide as x",
                W_enc.dim() == 2 && W_enc.size(1) == d && W_enc.size(0) >= 1);
    const int64_t N = W_enc.size(0);
    w.is_contiguous();
    b.has_dtype(ScalarType::Float,
                "float32 (with W_enc @ b_dec already subtracted, if the SAE does)");
    b.has_shape("[" + std::to_string(N) + "], contiguous",
                b_enc.dim() == 1 && b_enc.size(0) == N && b_enc.is_contiguous());
    check(k >= 1 && k <= N, w.op, "k is ", k, "; accepted: 1 to ", N, ", the number of latents");
    return {rows(w), static_cast<const float*>(b_enc.const_data_ptr()), N, k,
            order ? latents(*order, N) : nullptr};
  }

  // Their range and whether they are distinct can only be seen in their elements.
  Features features(const Tensor& features) const {
    const Argument a = named("features", features);
    a.has_dtype(ScalarType::Long, "int64");
    a.has_shape("[F]", features.dim() == 1);
    return {static_cast<const int64_t*>(features.const_data_ptr()), features.size(0)};
  }

  Rows directions(const Tensor& directions, int64_t F) const {
    const Argument a = named("directions", directions);
    a.has_shape("[F, d], a row of W_dec a feature",
                has_sizes(directions, {F, x_.t.size(x_.t.dim() - 1)}));
    return rows(a);
  }

  Values values(const char* name, const Tensor& values, int64_t F) const {
    const Argument a = named(name, values);
    a.has_dtype(ScalarType::Float, "float32");
    const bool shared = has_sizes(values, {F});
    a.has_shape("[F], or x's leading sizes and F",
                shared || has_sizes(values, like_tokens(x_.t, F)));
    return {static_cast<const float*>(values.const_data_ptr()), shared ? 0 : F};
  }

  const bool* mask(const Tensor& mask) const {
    const Argument a = named("mask", mask);
    a.has_dtype(ScalarType::Bool, "bool");
    a.has_shape("x's leading sizes", has_sizes(mask, like_tokens(x_.t, -1)));
    return static_cast<const bool*>(mask.const_data_ptr());
  }

  // A new tensor, or x itself, to be written.
  OutRows into(Tensor& y) const {
    const Argument a{x_.op, "y", y};
    return {y.mutable_data_ptr(), a.float_dtype(), y.size(y.dim() - 1)};
  }

  // For decode, whose first argument is `values`.
  const float* weights() const {
    x_.has_dtype(ScalarType::Float, "float32");
    x_.has_shape("[..., k]", x_.t.dim() >= 1);
    return static_cast<const float*>(x_.t.const_data_ptr());
  }
  const int64_t* indices(const Tensor& indices) const {
    const Argument a = named("indices", indices);
    a.has_dtype(ScalarType::Long, "int64");
    a.has_shape("values' shape", has_sizes(indices, like_tokens(x_.t, x_.t.size(-1))));
    return static_cast<const int64_t*>(indices.const_data_ptr());
  }
  Rows decoder(const Tensor& W_dec, const Tensor& b_dec) const {
    const Argument w = named("W_dec", W_dec), b = named("b_dec", b_dec);
    w.has_shape("[N, d], a latent a row", W_dec.dim() == 2);
    w.is_contiguous();
    b.float_dtype();
    b.has_shape("[d], as wide as W_dec", has_sizes(b_dec, {W_dec.size(1)}));
    return rows(w);
  }

 private:
  Argument named(const char* name, const Tensor& t) const {
    const Argument a{x_.op, name, t};
    a.is_with(x_);
    return a;
  }
  // Whether it is a permutation can only be seen in its elements.
  const int64_t* latents(const Tensor& order, int64_t N) const {
    const Argument a = named("order", order);
    a.has_dtype(ScalarType::Long, "int64");
    a.has_shape("[" + std::to_string(N) + "], contiguous, the latent of each row of W_enc",
                has_sizes(order, {N}) && order.is_contiguous());
    return static_cast<const int64_t*>(order.const_data_ptr());
  }
  static Rows rows(const Argument& a) {
    return {a.t.const_data_ptr(), a.float_dtype(), a.t.size(a.t.dim() - 1)};
  }

  const Argument x_;
};

}  // namespace saesteer
