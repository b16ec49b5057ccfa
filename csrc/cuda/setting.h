// What the environment asks of the kernels. Host code.
#pragma once

#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace saesteer::cuda {

// The variable's value, one of `accepted`; empty if it is not set.
inline std::string setting(const char* name, std::initializer_list<const char*> accepted) {
  const char* set = std::getenv(name);
  const std::string value = set ? set : "";
  if (value == "") return value;
  std::string list;
  for (const char* one : accepted) {
    if (value == one) return value;
    list += (list == "" ? "" : ", ") + std::string(one);
  }
  throw std::runtime_error(std::string("saesteer: ") + name + " is '" + value +
                           "'; accepted: " + list);
}

}  // namespace saesteer::cuda
