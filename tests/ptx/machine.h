// A launch at work: its grid, the blocks that are resident, their warps, and what is in flight.
//
// A lane has a program counter of its own. Of a warp those lanes run that are furthest behind, so
// that they meet again; instructions of a whole warp wait for its lanes. Warps take turns in a
// random order. What the hardware does at some later time happens as late, or as early, as it may.
#pragma once

#include <array>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "module.h"
#include "races.h"
#include "traffic.h"

namespace ptx {

constexpr int kWarp = 32;
constexpr uint32_t kEveryLane = 0xFFFFFFFF;
// Where a block's memory begins in the shared space; below it lies the system's.
constexpr int64_t kSharedBase = 1024;

struct Grid;
struct Block;

struct Clocks {
  Clock seen, published;

  void gather(const Agent& agent) { join(seen, agent.seen), join(published, agent.published); }
};

// bar.sync, bar.red
struct Barrier {
  int arrived = 0;
  uint32_t generation = 0;
  int holding = 0, result = 0;  // lanes whose predicate does
  Clocks gathered, released;
};

// mbarrier
struct PhaseBarrier {
  int expected = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;
  Clocks gathered, completed;

  void settle();
};

// A copy or product that runs beside its warp; its agent's number is free again at its end.
struct Flight {
  Races& races;
  Agent agent;

  Flight(Races& r, const Agent& from) : races(r), agent(r.fork(from)) {}
  ~Flight() { races.finish(agent); }
  Flight(const Flight&) = delete;
  Flight& operator=(const Flight&) = delete;
};

struct Copy {
  unsigned char* to;
  unsigned char bytes[16];
  int count;
};
struct CopyGroup {
  std::shared_ptr<Flight> flight;
  std::vector<Copy> copies;
};
struct Product {
  std::function<void()> work;
  std::vector<int> registers;
};
struct ProductGroup {
  std::shared_ptr<Flight> flight;
  std::vector<Product> products;
};

struct Warp {
  Block& block;
  int index;
  std::vector<uint64_t> registers;  // [register][lane]
  int together = 0;                 // where all lanes are; -1: each where `pc` says
  std::array<int, kWarp> pc{};
  uint32_t alive, parked = 0;  // parked: at an instruction of the whole warp
  Agent agent;
  uint32_t step = 0, syncs = 0;
  bool at_barrier = false;
  uint32_t generation = 0;  // of the barrier that it waits at

  std::shared_ptr<Flight> copying;  // of copies that are not committed
  std::array<std::vector<Copy>, kWarp> copies;
  std::array<std::deque<CopyGroup>, kWarp> copy_groups;
  std::shared_ptr<Flight> multiplying;
  std::vector<Product> products;
  std::deque<ProductGroup> product_groups;
  // By register, in kernels that have wgmma: whether a product in flight writes it, and the step
  // that used it last
  std::vector<uint8_t> locked;
  std::vector<uint32_t> used;
  uint32_t fenced = 0;  // the step of the last wgmma.fence

  Warp(Block& b, int i, uint32_t lanes, Agent a);
  ~Warp();

  // Of its first lane
  int where() const { return together >= 0 ? together : pc[__builtin_ctz(alive)]; }
  // Runs up to `most` instructions; whether any came to its end.
  bool run(int most);

  template <class T>
  T get(int reg, int lane) const {
    T v;
    memcpy(&v, &registers[static_cast<size_t>(reg) * kWarp + lane], sizeof v);
    return v;
  }
  template <class T>
  void put(int reg, int lane, T v) {
    uint64_t& word = registers[static_cast<size_t>(reg) * kWarp + lane];
    if constexpr (std::is_integral_v<T> && std::is_signed_v<T>)
      word = static_cast<uint64_t>(static_cast<int64_t>(v));
    else
      word = 0, memcpy(&word, &v, sizeof v);
  }
  // Of a predicate, or of its negation.
  bool holds(int reg, bool negated, int lane) const {
    return (get<uint8_t>(reg, lane) & 1) != negated;
  }
  bool holds(const Operand& o, int lane) const { return holds(o.reg, o.negated, lane); }
  // Of a register that has the same value in all lanes.
  uint64_t uniform(int reg) const { return get<uint64_t>(reg, 0); }

  // The bytes at an operand's address; checked, and followed by the race detector. `written`: what
  // an ordinary store puts there.
  unsigned char* access(const Instruction& i, int operand, int lane, int bytes, bool write,
                        const void* written = nullptr);
  unsigned char* shared(uint64_t address, int64_t bytes) const;

 private:
  bool step_once();
  uint32_t next(int& at);
  uint32_t guarded(const Instruction& i, uint32_t lanes) const;
  bool meet(const Instruction& i, uint32_t here, uint32_t runs);
  void move(uint32_t lanes, int at);
  void load_constants();
  void special(const std::string& name, uint64_t* lanes) const;
  void follow(const Instruction& i);
};

struct Block {
  Grid& grid;
  int64_t index;
  uint32_t x, y, z;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<std::function<void()>> events;  // tensor copies
  std::map<uint64_t, Barrier> barriers;
  std::map<uint64_t, PhaseBarrier> phase_barriers;  // by address
  const std::unique_ptr<unsigned char, decltype(&free)> storage;
  unsigned char* const memory;  // shared
  int64_t bytes;

  Block(Grid& g, int64_t i);

  // Where the dynamic memory begins, behind the static.
  int64_t dynamic() const;
  bool is_done() const;
  void require_landed() const;
  PhaseBarrier& phase_barrier(uint64_t address);
  bool contains(const void* p) const { return p >= memory && p < memory + bytes; }
};

struct Grid {
  const Kernel& kernel;
  const std::array<uint32_t, 3> blocks, threads;
  const int64_t shared;
  const bool together;
  std::vector<unsigned char> arguments;
  std::mt19937 random;
  Races races;
  std::unordered_map<uintptr_t, Clocks> released;   // by atomics, per address
  alignas(16) std::array<uint32_t, 4> workspace{};  // of cooperative groups
  std::vector<std::vector<uint64_t>> unused_registers;
  Traffic* traffic = nullptr;
  bool is_tritons = false;
  int64_t steps = 0;  // so far
  int left_out = -1;  // an instruction that is not run
  int64_t times_left_out = 0;

  Grid(const Kernel& k, const uint32_t* grid, const uint32_t* block, int64_t dynamic_shared,
       bool at_once, uint32_t seed)
      : kernel(k),
        blocks{grid[0], grid[1], grid[2]},
        threads{block[0], block[1], block[2]},
        shared(dynamic_shared),
        together(at_once),
        arguments(k.parameter_bytes + 1),
        random(seed) {}

  void run();

  int64_t count() const { return int64_t{blocks[0]} * blocks[1] * blocks[2]; }
  int threads_of_block() const { return static_cast<int>(threads[0] * threads[1] * threads[2]); }
  int warps_of_block() const { return (threads_of_block() + kWarp - 1) / kWarp; }
  bool coin() { return random() & 1; }

 private:
  bool turn(Block& block);
  [[noreturn]] void fail_waiting(const std::vector<std::unique_ptr<Block>>& resident) const;
};

inline int64_t Block::dynamic() const { return (grid.kernel.static_shared + 1023) & ~1023; }

template <class F>
void each(uint32_t mask, const F& f) {
  if (mask == kEveryLane)
    for (int lane = 0; lane < kWarp; ++lane) f(lane);
  else
    for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
}

inline Outcome nothing(Warp&, const Instruction&, uint32_t) { return Outcome::done; }

// By the first of an instruction's words.
Handler arithmetic(Instruction& i);
Handler memory(Instruction& i);
Handler synchronisation(Instruction& i);
Handler tensor(Instruction& i);

}  // namespace ptx
