// Which accesses to memory come before which, by vector clocks, so that two of which neither does
// are found in any order that the warps happen to take: the PTX memory model. A warp is one agent,
// so that what a lane releases it releases for all; among its lanes, barriers of the warp give
// order.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

namespace ptx {

// Of every agent, the time up to which its doings are known.
using Clock = std::vector<uint32_t>;

void join(Clock& into, const Clock& other);

// A warp, or a copy or product that runs beside it.
struct Agent {
  int id = -1;
  Clock seen;       // comes before what it does next
  Clock published;  // of that, what tensor copies and wgmma see: proxy fences
  Clock fenced;     // came before its last fence
  Clock met;        // what its relaxed reads have met, which its next fence will see

  // Of another agent, or of what several have left.
  template <class Other>
  void take(const Other& other) {
    join(seen, other.seen), join(published, other.published);
  }
  void tick() { ++seen[id]; }
};

struct Access {
  const Agent& agent;
  bool write;
  bool strong;     // atomic, volatile, relaxed: these do not race among themselves
  bool async;      // in the proxy of tensor copies and wgmma
  int lane;        // -1: the warp as a whole
  uint32_t step;   // the instruction's run, of which all lanes are one access
  uint32_t syncs;  // of the warp, so far
  int line;        // of the PTX
  // Of a write, other bytes than are there: who writes the same as another does no harm
  bool changes = true;
  // Of a read, past coherence: then nobody writes there as long as the kernel runs
  bool constant = false;
};

class Races {
 public:
  // Whether one instruction may write different things to one place.
  bool copies_differ = false;

  void begin(int warps);

  Agent warp(int id) const;
  // A copy or product that begins now, and one whose end `waiter` has waited for.
  Agent fork(const Agent& from);
  void finish(const Agent& done) { free_.push_back(done.id); }

  // Throws std::runtime_error if the access races with an earlier one.
  void touch(const void* at, int bytes, const Access& access);
  // Nobody has touched these bytes yet, nor the rest of their pages of 1024.
  void forget(const void* at, int64_t bytes);
  void require_written(const void* at, int bytes);

 private:
  struct Touch {
    uint32_t time = 0, step = 0, syncs = 0;
    int32_t line = 0;
    int16_t agent = -1;
    int8_t lane = 0;
    bool strong = false, async = false;
  };
  // The last write, and some of the reads since
  struct Shadow {
    Touch write;
    std::array<Touch, 3> reads;
    bool constant = false;  // it has been read past coherence
  };
  // Of 1024 bytes: a shadow for every `grain` of them, as few as the accesses to them allow.
  struct Page {
    int grain;
    std::vector<Shadow> shadows;
  };

  template <class F>
  void each_shadow(uintptr_t at, int bytes, const F& f);
  Page& page(uintptr_t key, int grain);
  static bool before(const Touch& earlier, const Access& now);
  [[noreturn]] static void fail(const Touch& earlier, bool wrote, const Access& now,
                                const char* how);

  std::unordered_map<uintptr_t, Page> pages_;
  uintptr_t last_key_ = 0;
  Page* last_ = nullptr;
  int warps_ = 0;
  std::vector<int> free_;
  std::vector<uint32_t> times_;
  uint32_t turn_ = 0;
};

}  // namespace ptx
