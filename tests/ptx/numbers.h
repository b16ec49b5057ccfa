// The 16-bit floating types, and types by their PTX names.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace ptx {

struct F16 {
  uint16_t bits;

  F16() = default;
  explicit F16(float v) {
    const auto h = static_cast<_Float16>(v);
    memcpy(&bits, &h, 2);
  }
  operator float() const {
    _Float16 h;
    memcpy(&h, &bits, 2);
    return static_cast<float>(h);
  }
};

struct BF16 {
  uint16_t bits;

  BF16() = default;
  explicit BF16(float v) {
    uint32_t u;
    memcpy(&u, &v, 4);
    bits = static_cast<uint16_t>(v != v ? 0x7FFF : (u + 0x7FFF + (u >> 16 & 1)) >> 16);
  }
  operator float() const {
    const uint32_t u = uint32_t{bits} << 16;
    float v;
    memcpy(&v, &u, 4);
    return v;
  }
};

// A GPU has one NaN.
template <class T>
T canonical(T v) {
  if constexpr (std::is_same_v<T, float>)
    if (v != v) {
      const uint32_t bits = 0x7FFFFFFF;
      memcpy(&v, &bits, sizeof v);
    }
  return v;
}

// Registers hold a predicate as 0 or 1.
struct Predicate {
  uint8_t on;
};

template <class T>
struct Type {
  using type = T;
};

// f(Type<T>{}) with the T that PTX calls `name`.
template <class F>
auto with_integer(const std::string& name, const F& f) {
  if (name == "u8" || name == "b8") return f(Type<uint8_t>{});
  if (name == "s8") return f(Type<int8_t>{});
  if (name == "u16" || name == "b16") return f(Type<uint16_t>{});
  if (name == "s16") return f(Type<int16_t>{});
  if (name == "u32" || name == "b32") return f(Type<uint32_t>{});
  if (name == "s32") return f(Type<int32_t>{});
  if (name == "u64" || name == "b64") return f(Type<uint64_t>{});
  if (name == "s64") return f(Type<int64_t>{});
  throw std::runtime_error("no type " + name + " here");
}

template <class F>
auto with_number(const std::string& name, const F& f) {
  if (name == "f32") return f(Type<float>{});
  if (name == "f64") return f(Type<double>{});
  return with_integer(name, f);
}

template <class F>
auto with_any(const std::string& name, const F& f) {
  if (name == "f16") return f(Type<F16>{});
  if (name == "bf16") return f(Type<BF16>{});
  return with_number(name, f);
}

inline int bytes_of(const std::string& type) {
  return with_any(type,
                  [](auto t) { return static_cast<int>(sizeof(typename decltype(t)::type)); });
}

}  // namespace ptx
