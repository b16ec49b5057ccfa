// Instructions that touch registers alone.
#include <limits>
#include <utility>

#include "machine.h"
#include "numbers.h"

namespace ptx {

namespace {

// R of operands of the types A. What computes with several numbers gives a GPU's NaN.
template <class R, class... A, class F, size_t... kPlaces>
Outcome apply(Warp& w, const Instruction& i, uint32_t lanes, const F& f,
              std::index_sequence<kPlaces...>) {
  const auto& o = i.operands;
  each(lanes, [&](int l) {
    const R v = f(w.get<A>(o[kPlaces + 1].reg, l)...);
    w.put<R>(o[0].reg, l, sizeof...(A) > 1 ? canonical<R>(v) : v);
  });
  return Outcome::done;
}
template <class R, class... A, class F>
Outcome apply(Warp& w, const Instruction& i, uint32_t lanes, const F& f) {
  return apply<R, A...>(w, i, lanes, f, std::index_sequence_for<A...>());
}

// A sum, difference or product of integers wraps around.
template <class T, class F>
T wrapped(T a, T b, const F& f) {
  if constexpr (std::is_integral_v<T>) {
    using U = uint64_t;
    return static_cast<T>(f(static_cast<U>(a), static_cast<U>(b)));
  } else {
    return f(a, b);
  }
}

#define PTX_HANDLER(body) \
  [](Warp& w, const Instruction& i, uint32_t lanes) -> Outcome { return body; }

template <class T>
Handler of_numbers(const std::string& op) {
  if (op == "add")
    return PTX_HANDLER((apply<T, T, T>(w, i, lanes, [](T a, T b) {
      return wrapped(a, b, [](auto x, auto y) { return x + y; });
    })));
  if (op == "sub")
    return PTX_HANDLER((apply<T, T, T>(w, i, lanes, [](T a, T b) {
      return wrapped(a, b, [](auto x, auto y) { return x - y; });
    })));
  if (op == "neg")
    return PTX_HANDLER((apply<T, T>(w, i, lanes, [](T a) {
      if constexpr (std::is_integral_v<T>)
        return static_cast<T>(-static_cast<uint64_t>(a));
      else
        return -a;
    })));
  if (op == "abs")
    return PTX_HANDLER((apply<T, T>(w, i, lanes, [](T a) {
      if constexpr (std::is_integral_v<T>)
        return a < T{} ? static_cast<T>(-static_cast<uint64_t>(a)) : a;
      else
        return std::fabs(a);
    })));
  // Of a number and NaN, the number
  if (op == "min")
    return PTX_HANDLER(
        (apply<T, T, T>(w, i, lanes, [](T a, T b) { return a != a || b < a ? b : a; })));
  if (op == "max")
    return PTX_HANDLER(
        (apply<T, T, T>(w, i, lanes, [](T a, T b) { return a != a || b > a ? b : a; })));
  return nullptr;
}

float largest_or_nan(float a, float b) {
  return a != a || b != b ? std::numeric_limits<float>::quiet_NaN() : std::fmax(a, b);
}

template <class T>
Handler of_floats(const std::string& op) {
  if (op == "mul")
    return PTX_HANDLER((apply<T, T, T>(w, i, lanes, [](T a, T b) { return a * b; })));
  if (op == "div")
    return PTX_HANDLER((apply<T, T, T>(w, i, lanes, [](T a, T b) { return a / b; })));
  if (op == "fma")
    return PTX_HANDLER(
        (apply<T, T, T, T>(w, i, lanes, [](T a, T b, T c) { return std::fma(a, b, c); })));
  return nullptr;
}

// The lowest number's by -1 wraps around; without a divisor a GPU gives all ones.
template <class T>
T quotient(T a, T b) {
  if (b == 0) return static_cast<T>(~uint64_t{0});
  if (std::is_signed_v<T> && b == static_cast<T>(-1))
    return static_cast<T>(-static_cast<uint64_t>(a));
  return static_cast<T>(a / b);
}

template <class T>
Handler of_integers(const std::string& op) {
  if (op == "and")
    return PTX_HANDLER(
        (apply<T, T, T>(w, i, lanes, [](T a, T b) { return static_cast<T>(a & b); })));
  if (op == "or")
    return PTX_HANDLER(
        (apply<T, T, T>(w, i, lanes, [](T a, T b) { return static_cast<T>(a | b); })));
  if (op == "xor")
    return PTX_HANDLER(
        (apply<T, T, T>(w, i, lanes, [](T a, T b) { return static_cast<T>(a ^ b); })));
  if (op == "not")
    return PTX_HANDLER((apply<T, T>(w, i, lanes, [](T a) { return static_cast<T>(~a); })));
  if (op == "div") return PTX_HANDLER((apply<T, T, T>(w, i, lanes, quotient<T>)));
  if (op == "rem")
    return PTX_HANDLER((apply<T, T, T>(w, i, lanes, [](T a, T b) {
      return static_cast<T>(a - static_cast<uint64_t>(quotient(a, b)) * b);
    })));
  return nullptr;
}

// ---- products of integers: mul, mad, with .lo, .hi or .wide ----

template <class T>
using Wide =
    std::conditional_t<sizeof(T) == 8,
                       std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
                       std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;

template <class T>
Handler product(const Instruction& i) {
  if (i.has("hi")) {
    if (i.words[0] == "mad") return nullptr;
    return PTX_HANDLER((apply<T, T, T>(w, i, lanes, [](T a, T b) {
      return static_cast<T>(static_cast<Wide<T>>(a) * b >> 8 * sizeof(T));
    })));
  }
  if (i.has("wide")) {
    using R = std::conditional_t<sizeof(T) == 2,
                                 std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
                                 std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;
    if (i.words[0] == "mul")
      return PTX_HANDLER(
          (apply<R, T, T>(w, i, lanes, [](T a, T b) { return static_cast<R>(a) * b; })));
    return PTX_HANDLER((apply<R, T, T, R>(w, i, lanes, [](T a, T b, R c) {
      return static_cast<R>(static_cast<uint64_t>(static_cast<R>(a) * b) + c);
    })));
  }
  if (i.words[0] == "mul")
    return PTX_HANDLER((apply<T, T, T>(w, i, lanes, [](T a, T b) {
      return wrapped(a, b, [](auto x, auto y) { return x * y; });
    })));
  return PTX_HANDLER((apply<T, T, T, T>(w, i, lanes, [](T a, T b, T c) {
    return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b) + c);
  })));
}

// ---- shifts and bits ----

template <class T>
Handler shift(const std::string& op) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  if (op == "shl")
    return PTX_HANDLER((apply<T, T, uint32_t>(w, i, lanes, [](T a, uint32_t by) {
      return static_cast<T>(by < kBits ? static_cast<uint64_t>(a) << by : 0);
    })));
  return PTX_HANDLER((apply<T, T, uint32_t>(w, i, lanes, [](T a, uint32_t by) {
    return static_cast<T>(by < kBits ? a >> by : a < T{} ? -1 : 0);
  })));
}

template <class T>
T extracted(T a, uint32_t position, uint32_t length) {
  constexpr int kBits = 8 * sizeof(T);
  position &= 0xFF, length &= 0xFF;
  const auto bit = [&](uint32_t b) { return static_cast<uint64_t>(a) >> b & 1; };
  if (length == 0) return 0;
  const uint32_t top = std::min<uint32_t>(position + length - 1, kBits - 1);
  const bool fill = std::is_signed_v<T> && bit(top);
  uint64_t v = 0;
  for (int b = 0; b < kBits; ++b) {
    const uint32_t from = position + b;
    const bool inside = b < static_cast<int>(length) && from < kBits;
    v |= (inside ? bit(from) : static_cast<uint64_t>(fill)) << b;
  }
  return static_cast<T>(v);
}

template <class T>
T inserted(T a, T into, uint32_t position, uint32_t length) {
  position &= 0xFF, length &= 0xFF;
  for (uint32_t b = 0; b < length && position + b < 8 * sizeof(T); ++b) {
    const T one = T{1} << (position + b);
    into = static_cast<T>((into & ~one) | ((a >> b & 1) << (position + b)));
  }
  return into;
}

template <class T>
Handler bits(const std::string& op) {
  if (op == "popc")
    return PTX_HANDLER((apply<uint32_t, T>(w, i, lanes, [](T a) {
      return static_cast<uint32_t>(__builtin_popcountll(static_cast<std::make_unsigned_t<T>>(a)));
    })));
  if (op == "clz")
    return PTX_HANDLER((apply<uint32_t, T>(w, i, lanes, [](T a) -> uint32_t {
      const uint64_t u = static_cast<std::make_unsigned_t<T>>(a);
      return u ? __builtin_clzll(u) - (64 - 8 * sizeof(T)) : 8 * sizeof(T);
    })));
  if (op == "brev")
    return PTX_HANDLER((apply<T, T>(w, i, lanes, [](T a) {
      T v = 0;
      for (size_t b = 0; b < 8 * sizeof(T); ++b) v = static_cast<T>(v << 1 | (a >> b & 1));
      return v;
    })));
  if (op == "bfe") return PTX_HANDLER((apply<T, T, uint32_t, uint32_t>(w, i, lanes, extracted<T>)));
  return PTX_HANDLER((apply<T, T, T, uint32_t, uint32_t>(w, i, lanes, inserted<T>)));
}

uint32_t permuted(uint32_t a, uint32_t b, uint32_t chosen) {
  const uint64_t from = a | uint64_t{b} << 32;
  uint32_t v = 0;
  for (int byte = 0; byte < 4; ++byte) {
    const uint32_t which = chosen >> 4 * byte & 0xF;
    uint32_t bits = from >> 8 * (which & 7) & 0xFF;
    if (which & 8) bits = bits & 0x80 ? 0xFF : 0;
    v |= bits << 8 * byte;
  }
  return v;
}

// ---- comparisons ----

enum Comparison { kEq, kNe, kLt, kLe, kGt, kGe, kNum, kNan };

// With a u at the end of the name a comparison with NaN holds.
template <class T>
bool compare(int which, T a, T b) {
  const bool unordered = a != a || b != b;
  if (unordered) return which & 8 || which == kNan;
  switch (which & 7) {
    case kEq:
      return a == b;
    case kNe:
      return a != b;
    case kLt:
      return a < b;
    case kLe:
      return a <= b;
    case kGt:
      return a > b;
    case kGe:
      return a >= b;
    default:
      return which == kNum;
  }
}

int comparison(const std::string& name) {
  const std::map<std::string, int> named = {
      {"eq", kEq},      {"ne", kNe},      {"lt", kLt},      {"le", kLe},      {"gt", kGt},
      {"ge", kGe},      {"lo", kLt},      {"ls", kLe},      {"hi", kGt},      {"hs", kGe},
      {"equ", kEq | 8}, {"neu", kNe | 8}, {"ltu", kLt | 8}, {"leu", kLe | 8}, {"gtu", kGt | 8},
      {"geu", kGe | 8}, {"num", kNum},    {"nan", kNan}};
  return named.at(name);
}

template <class T>
Outcome set_predicate(Warp& w, const Instruction& i, uint32_t lanes) {
  const auto& o = i.operands;
  each(lanes, [&](int l) {
    const bool v = compare(i.variant, w.get<T>(o[1].reg, l), w.get<T>(o[2].reg, l));
    w.put(o[0].reg, l, Predicate{v});
    if (o[0].second >= 0) w.put(o[0].second, l, Predicate{!v});
  });
  return Outcome::done;
}

template <class T>
Outcome select(Warp& w, const Instruction& i, uint32_t lanes) {
  const auto& o = i.operands;
  each(lanes,
       [&](int l) { w.put<T>(o[0].reg, l, w.get<T>(w.holds(o[3], l) ? o[1].reg : o[2].reg, l)); });
  return Outcome::done;
}

Handler of_predicates(const std::string& op) {
#define PTX_PREDICATE(of)                                                                 \
  [](Warp& w, const Instruction& i, uint32_t lanes) {                                     \
    each(lanes, [&](int l) {                                                              \
      const bool a = w.holds(i.operands[1], l);                                           \
      [[maybe_unused]] const bool b = i.operands.size() > 2 && w.holds(i.operands[2], l); \
      w.put(i.operands[0].reg, l, Predicate{of});                                         \
    });                                                                                   \
    return Outcome::done;                                                                 \
  }
  if (op == "and") return PTX_PREDICATE(a && b);
  if (op == "or") return PTX_PREDICATE(a || b);
  if (op == "xor") return PTX_PREDICATE(a != b);
  if (op == "not") return PTX_PREDICATE(!a);
  if (op == "mov") return PTX_PREDICATE(a);
#undef PTX_PREDICATE
  return nullptr;
}

// ---- mov and cvt ----

// Also d = {a, b, ...} and {a, b, ...} = d, the lowest bits first.
template <class T>
Outcome move(Warp& w, const Instruction& i, uint32_t lanes) {
  const Operand &to = i.operands[0], &from = i.operands[1];
  if (to.list.empty() && from.list.empty()) return apply<T, T>(w, i, lanes, [](T v) { return v; });
  each(lanes, [&](int l) {
    uint64_t v = 0;
    if (from.list.empty()) v = static_cast<uint64_t>(w.get<std::make_unsigned_t<T>>(from.reg, l));
    const int into = static_cast<int>(8 * sizeof(T) / std::max<size_t>(1, to.list.size()));
    const int out = static_cast<int>(8 * sizeof(T) / std::max<size_t>(1, from.list.size()));
    for (size_t k = 0; k < from.list.size(); ++k)
      v |= (w.get<uint64_t>(from.list[k], l) & (~uint64_t{0} >> (64 - out))) << out * k;
    if (to.list.empty()) w.put<T>(to.reg, l, static_cast<T>(v));
    for (size_t k = 0; k < to.list.size(); ++k)
      if (to.list[k] >= 0)
        w.put<uint64_t>(to.list[k], l, v >> into * k & (~uint64_t{0} >> (64 - into)));
  });
  return Outcome::done;
}

template <class R, class T>
R converted(T v, int rounding) {
  if constexpr (std::is_integral_v<R> && !std::is_integral_v<T>) {
    double x = static_cast<float>(v);
    if constexpr (std::is_same_v<T, double>) x = v;
    if (x != x) return 0;
    x = rounding == 'z'   ? std::trunc(x)
        : rounding == 'm' ? std::floor(x)
        : rounding == 'p' ? std::ceil(x)
                          : std::nearbyint(x);
    const double low = static_cast<double>(std::numeric_limits<R>::min());
    const double high = std::ldexp(1.0, std::numeric_limits<R>::digits);
    return x < low     ? std::numeric_limits<R>::min()
           : x >= high ? std::numeric_limits<R>::max()
                       : static_cast<R>(x);
  } else if constexpr (std::is_integral_v<R>) {
    return static_cast<R>(v);
  } else if constexpr (std::is_integral_v<T> || std::is_same_v<T, double>) {
    return R(v);
  } else {
    return R(static_cast<float>(v));
  }
}

Handler convert(Instruction& i) {
  const std::string &to = i.words[i.words.size() - 2], &from = i.words.back();
  for (const char* mode : {"rni", "rzi", "rmi", "rpi"})
    if (i.has(mode)) i.variant = mode[1];
  if (i.has("rz") || i.has("rm") || i.has("rp")) return nullptr;
  // d = {a in its upper half, b in its lower}
  if (to == "bf16x2" || to == "f16x2") {
    if (to == "bf16x2")
      return PTX_HANDLER((apply<uint32_t, float, float>(w, i, lanes, [](float a, float b) {
        return uint32_t{BF16(a).bits} << 16 | BF16(b).bits;
      })));
    return PTX_HANDLER((apply<uint32_t, float, float>(
        w, i, lanes, [](float a, float b) { return uint32_t{F16(a).bits} << 16 | F16(b).bits; })));
  }
  return with_any(to, [&](auto r) {
    return with_any(from, [](auto t) -> Handler {
      using R = typename decltype(r)::type;
      using T = typename decltype(t)::type;
      return PTX_HANDLER(
          (apply<R, T>(w, i, lanes, [&i](T v) { return converted<R>(v, i.variant); })));
    });
  });
}

}  // namespace

Handler arithmetic(Instruction& i) {
  const std::string &op = i.words[0], &type = i.words.back();
  if (type == "pred") return of_predicates(op);
  if (i.has("NaN")) {
    if (op != "max" || type != "f32") return nullptr;
    return PTX_HANDLER((apply<float, float, float>(w, i, lanes, largest_or_nan)));
  }
  for (const char* word : {"ftz", "sat", "approx", "full"})
    if (i.has(word)) return nullptr;
  if (op == "cvt") return convert(i);
  if (op == "prmt" && type == "b32")
    return PTX_HANDLER((apply<uint32_t, uint32_t, uint32_t, uint32_t>(w, i, lanes, permuted)));
  if (op == "setp") {
    if (i.words.size() != 3) return nullptr;
    i.variant = comparison(i.words[1]);
    return with_number(type,
                       [](auto t) -> Handler { return set_predicate<typename decltype(t)::type>; });
  }
  if (op == "mov" || op == "selp") {
    const std::string size = "u" + std::to_string(8 * bytes_of(type));
    return with_integer(size, [&](auto t) -> Handler {
      using T = typename decltype(t)::type;
      return op == "mov" ? move<T> : select<T>;
    });
  }
  return with_number(type, [&](auto t) -> Handler {
    using T = typename decltype(t)::type;
    if (Handler found = of_numbers<T>(op)) return found;
    if constexpr (!std::is_integral_v<T>)
      return of_floats<T>(op);
    else {
      if (op == "mul" || op == "mad") return product<T>(i);
      if (op == "shl" || op == "shr") return shift<T>(op);
      for (const char* name : {"popc", "clz", "brev", "bfe", "bfi"})
        if (op == name) return bits<T>(op);
      return of_integers<T>(op);
    }
  });
}

}  // namespace ptx
