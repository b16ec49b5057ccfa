// What the environment asks of the kernels. Host code.
#pragma once

#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace saesteer::cuda {

// A variable, read again only after a change of the environment: that puts another pointer into
// `environ`, and comparing these takes a quarter of the time in which getenv compares names.
class Setting {
 public:
  Setting(const char* name, std::vector<const char*> accepted)
      : name_(name), accepted_(std::move(accepted)) {}

  // One of `accepted`; empty if it is not set.
  const std::string& value() {
    const bool is_known = environ == array_ && !seen_.empty() &&
                          memcmp(environ, seen_.data(), seen_.size() * sizeof(char*)) == 0;
    if (!is_known) read();
    return value_;
  }

 private:
  void read() {
    seen_.clear();  // an error is one again the next time
    const char* set = std::getenv(name_);
    value_ = set ? set : "";
    require_accepted();
    array_ = environ;
    if (!array_) return;
    int count = 0;
    while (array_[count++]) continue;
    seen_.assign(array_, array_ + count);
  }

  void require_accepted() const {
    if (value_ == "") return;
    std::string list;
    for (const char* one : accepted_) {
      if (value_ == one) return;
      list += (list == "" ? "" : ", ") + std::string(one);
    }
    throw std::runtime_error(std::string("saesteer: ") + name_ + " is '" + value_ +
                             "'; accepted: " + list);
  }

  const char* name_;
  std::vector<const char*> accepted_;
  char** array_ = nullptr;
  std::vector<char*> seen_;  // what it held, to the null at its end
  std::string value_;
};

}  // namespace saesteer::cuda
