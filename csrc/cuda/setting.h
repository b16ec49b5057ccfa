// What the environment asks of the kernels. Host code.
#pragma once

#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>

namespace saesteer::cuda {

// The variable's value, one of `accepted`; empty if it is not set.
inline std::string_view setting(const char* name,
                                std::initializer_list<std::string_view> accepted) {
  const char* const set = std::getenv(name);
  const std::string_view value = set ? set : "";
  if (value.empty()) return value;
  std::string list;
  for (const std::string_view one : accepted) {
    if (value == one) return value;
    list.append(list.empty() ? "" : ", ").append(one);
  }
  throw std::runtime_error("saesteer: " + std::string(name) + " is '" + std::string(value) +
                           "'; accepted: " + list);
}

}  // namespace saesteer::cuda
