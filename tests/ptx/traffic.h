// How much memory instructions touch, and in how many parts: sectors of 32 bytes of global memory,
// passes over the 32 banks of shared memory.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <vector>

namespace ptx {

struct Request {
  uint64_t address;
  int bytes;
};

class Traffic {
 public:
  enum Kind { read, write, shared, ahead };  // ahead: only as far as the cache

  bool on = false;

  // Of a lane of the instruction that is running.
  void lane(Kind kind, const void* address, int bytes) {
    if (on) lanes_[kind].push_back({reinterpret_cast<uint64_t>(address), bytes});
  }
  // The instruction has run.
  void end(const std::string& kernel, int line) {
    if (on) count(kernel, line);
  }
  // A line each: kernel, line of the PTX, kind, runs, bytes, parts, the fewest parts for those
  // bytes.
  std::string told() const;
  void clear() { counts_.clear(); }

 private:
  struct Count {
    int64_t runs = 0, bytes = 0, parts = 0, fewest = 0;
  };
  struct Key {
    std::string kernel;
    int line, kind;

    bool operator<(const Key& other) const {
      return std::tie(kernel, line, kind) < std::tie(other.kernel, other.line, other.kind);
    }
  };

  void count(const std::string& kernel, int line);

  std::vector<Request> lanes_[4];
  std::map<Key, Count> counts_;
};

}  // namespace ptx
