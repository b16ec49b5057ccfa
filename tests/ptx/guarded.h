// An exception as C gives it on.
#pragma once

#include <exception>
#include <string>

// The text of what `work` throws, until the next such call; null if it throws nothing.
template <class F>
const char* guarded(const F& work) {
  static std::string error;
  try {
    work();
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}
