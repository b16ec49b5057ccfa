// A GPU's blocks of threads on the CPU, so that csrc/cuda runs and is tested without a GPU: the
// names of csrc/cuda/ptx.h and launch.h, with the meaning that the PTX manual gives them.
//
// Threads are fibers that take turns in a random order. What the hardware does at some later time
// is done as late, or as early, as it may be: a copy lands when somebody waits for it, a product is
// taken when it is waited for, and shared memory has a second face that tensor copies and wgmma
// see, in which ordinary writes show only after a fence. A barrier that not everybody reaches is an
// error, and so is a misaligned access. Blocks run one after the other, those of a launch together
// in turns too.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct Index {
  uint32_t x;
};
inline Index threadIdx, blockIdx, gridDim;

namespace saesteer::cuda {

namespace emulated {

constexpr size_t kStack = 1 << 17, kSharedBytes = 227 << 10, kWarp = 32;

struct Settings {
  int multiprocessors = 3;
  bool hopper = false;
  uint32_t seed = 0;
};
inline Settings settings;

struct Barrier {
  int arrived = 0;
  uint32_t generation = 0;
  bool any = false, result = false;
};

struct SharedBarrier {
  int arrivals, pending;
  int64_t bytes = 0;
  uint32_t phase = 0;

  void settle() {
    if (pending || bytes) return;
    pending = arrivals;
    phase ^= 1;
  }
};

struct Copy {
  unsigned char* to;
  unsigned char bytes[16];
};

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStack]};
  bool started = false, done = false;
  uint32_t index = 0;
  std::vector<Copy> copies;              // not committed
  std::deque<std::vector<Copy>> groups;  // committed, not landed
  std::vector<unsigned char*> written;   // landed, not published
  std::vector<std::function<void()>> products;
  std::deque<std::vector<std::function<void()>>> product_groups;
};

struct Warp {
  Barrier barrier;
  uint32_t words[kWarp][6];
  const unsigned char* rows[kWarp];
};

// A block, and what its threads share.
struct Block {
  uint32_t index = 0;
  size_t done = 0;  // threads
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::function<void()>> events;
  std::map<int, Barrier> barriers;
  std::map<uint64_t*, SharedBarrier> shared_barriers;
  std::vector<Warp> warps;
  // What threads see, and what tensor copies and wgmma see
  unsigned char* const shared = allocated();
  unsigned char* const async = allocated();

  static unsigned char* allocated() {
    return static_cast<unsigned char*>(aligned_alloc(1024, kSharedBytes));
  }

  SharedBarrier& shared_barrier(uint64_t* at);
};

struct Machine {
  std::vector<std::unique_ptr<Block>> blocks;  // as many as were ever alive at once
  size_t threads = 0;                          // of a block
  Block* block = nullptr;
  Fiber* now = nullptr;
  jmp_buf scheduler;
  std::function<void()> kernel;
  std::string error;
  bool progress = false;
  std::mt19937 random;
  Barrier grid;
  size_t grid_threads = 0;  // 0: the launch was not together
  int launches = 0;

  bool coin() { return random() & 1; }

  [[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what); }

  void yield() {
    if (!_setjmp(now->at)) _longjmp(scheduler, 1);
  }

  template <class Condition>
  void wait(const Condition& holds) {
    while (!holds()) yield();
    progress = true;
  }

  static void enter();

  void resume(Block& b, Fiber& fiber) {
    block = &b;
    now = &fiber;
    blockIdx.x = b.index;
    threadIdx.x = fiber.index;
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    setcontext(&fiber.start);
  }

  void begin(Block& b, int64_t index) {
    b.index = static_cast<uint32_t>(index);
    b.done = 0;
    while (b.fibers.size() < threads) b.fibers.push_back(std::make_unique<Fiber>());
    b.events.clear(), b.barriers.clear(), b.shared_barriers.clear();
    b.warps.assign((threads + kWarp - 1) / kWarp, Warp());
    memset(b.shared, 0xFF, kSharedBytes);
    memset(b.async, 0xFF, kSharedBytes);
    for (size_t i = 0; i < threads; ++i) {
      Fiber& f = *b.fibers[i];
      f.started = f.done = false;
      f.index = static_cast<uint32_t>(i);
      f.copies.clear(), f.groups.clear(), f.written.clear();
      f.products.clear(), f.product_groups.clear();
      getcontext(&f.start);
      f.start.uc_stack.ss_sp = f.stack.get();
      f.start.uc_stack.ss_size = kStack;
      f.start.uc_link = nullptr;
      makecontext(&f.start, enter, 0);
    }
  }

  // Every thread's turn, and perhaps an event.
  void turn(Block& b) {
    const size_t first = random() % threads;
    for (size_t i = 0; i < threads; ++i) {
      Fiber& f = *b.fibers[(first + i) % threads];
      if (f.done) continue;
      resume(b, f);
      if (!error.empty()) fail(std::exchange(error, ""));
      b.done += f.done;
    }
    if (!b.events.empty() && (!progress || coin())) {
      const size_t which = random() % b.events.size();
      const auto event = b.events[which];
      b.events.erase(b.events.begin() + which);
      event();
      progress = true;
    }
    if (b.done == threads) end(b);
  }

  void end(const Block& b) {
    if (!b.events.empty()) fail("a block ended before its tensor copies");
    for (size_t i = 0; i < threads; ++i) {
      for (auto& group : b.fibers[i]->groups)
        if (!group.empty()) fail("a block ended before its copies");
      if (!b.fibers[i]->product_groups.empty()) fail("a block ended before its products");
    }
  }

  // Blocks first, first + 1, ..., alive at once.
  void run_blocks(int64_t first, size_t count) {
    while (blocks.size() < count) blocks.push_back(std::make_unique<Block>());
    for (size_t b = 0; b < count; ++b) begin(*blocks[b], first + b);
    std::vector<Block*> alive;
    for (size_t b = 0; b < count; ++b) alive.push_back(blocks[b].get());
    while (!alive.empty()) {
      bool any = false;
      const size_t start = random() % alive.size();
      for (size_t i = 0; i < alive.size(); ++i) {
        Block& b = *alive[(start + i) % alive.size()];
        // Some blocks come far before others begin.
        do {
          progress = false;
          turn(b);
          any |= progress;
        } while (progress && b.done < threads && random() % 16);
      }
      if (!any) fail_waiting(alive);
      alive.erase(std::remove_if(alive.begin(), alive.end(),
                                 [&](const Block* b) { return b->done == threads; }),
                  alive.end());
    }
  }

  [[noreturn]] void fail_waiting(const std::vector<Block*>& alive) {
    const Block& b = *alive.front();
    fail("a barrier that not all threads reach: " + std::to_string(threads - b.done) + " of " +
         std::to_string(threads) + " threads wait for ever in block " + std::to_string(b.index));
  }

  void run(int64_t count, int block_threads, bool together, const std::function<void()>& body) {
    ++launches;
    kernel = body;
    threads = block_threads;
    random.seed(settings.seed);
    gridDim.x = static_cast<uint32_t>(count);
    grid = {};
    grid_threads = together ? count * threads : 0;
    if (together) return run_blocks(0, count);
    for (int64_t b = 0; b < count; ++b) run_blocks(b, 1);
  }

  void arrive_and_wait(Barrier& b, int expected, bool v = false) {
    b.any |= v;
    const uint32_t generation = b.generation;
    if (++b.arrived == expected) {
      b.arrived = 0;
      b.result = b.any;
      b.any = false;
      ++b.generation;
      progress = true;
    } else {
      wait([&] { return b.generation != generation; });
    }
  }

  Warp& warp() { return block->warps[threadIdx.x / kWarp]; }
  int lane() { return threadIdx.x % kWarp; }
  void join_warp() { arrive_and_wait(warp().barrier, kWarp); }

  void land(const Copy& copy) {
    memcpy(copy.to, copy.bytes, 16);
    now->written.push_back(copy.to);
  }
};

inline Machine& machine() {
  static Machine m;
  return m;
}

inline SharedBarrier& Block::shared_barrier(uint64_t* at) {
  const auto found = shared_barriers.find(at);
  if (found == shared_barriers.end()) machine().fail("a shared barrier that was not initialised");
  return found->second;
}

inline void Machine::enter() {
  Machine& m = machine();
  try {
    m.kernel();
  } catch (const std::exception& e) {
    m.error = e.what();
  }
  m.now->done = true;
  m.progress = true;
  _longjmp(m.scheduler, 1);
}

inline float from_bf16(uint16_t bits) {
  const uint32_t u = uint32_t{bits} << 16;
  float v;
  memcpy(&v, &u, 4);
  return v;
}

inline float from_f16(uint16_t bits) {
  _Float16 v;
  memcpy(&v, &bits, 2);
  return static_cast<float>(v);
}

template <bool kBf16>
float from_16(uint16_t bits) {
  return kBf16 ? from_bf16(bits) : from_f16(bits);
}

inline void take(std::vector<std::function<void()>>& products) {
  for (const auto& product : products) product();
  products.clear();
}

inline void check_aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) machine().fail("a misaligned access");
}

}  // namespace emulated

template <class T>
T* shared(int64_t from = 0) {
  return reinterpret_cast<T*>(emulated::machine().block->shared + from);
}

// ---- numbers ----

inline float f16_to_f32(uint16_t bits) { return emulated::from_f16(bits); }

inline uint16_t f32_to_f16(float v) {
  const _Float16 h = static_cast<_Float16>(v);
  uint16_t bits;
  memcpy(&bits, &h, 2);
  return bits;
}

inline uint16_t f32_to_bf16(float v) {
  if (v != v) return 0x7FFF;
  uint32_t u;
  memcpy(&u, &v, 4);
  return static_cast<uint16_t>((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}

inline int lowest_bit(uint64_t word) { return __builtin_ctzll(word); }

// ---- threads ----

inline bool sync_some_or(int barrier, int threads, bool v) {
  auto& m = emulated::machine();
  auto& b = m.block->barriers[barrier];
  m.arrive_and_wait(b, threads, v);
  return b.result;
}
inline bool sync_threads_or(bool v) {
  return sync_some_or(0, static_cast<int>(emulated::machine().threads), v);
}
inline void sync_threads() { sync_threads_or(false); }
inline void sync_grid() {
  auto& m = emulated::machine();
  if (m.grid_threads == 0) m.fail("a barrier of blocks that were not launched together");
  m.arrive_and_wait(m.grid, static_cast<int>(m.grid_threads));
}
inline void sync_warp() { emulated::machine().join_warp(); }

template <class T>
T shuffle_xor(T v, int lanes) {
  auto& m = emulated::machine();
  static_assert(sizeof v == 4);
  memcpy(&m.warp().words[m.lane()][0], &v, 4);
  m.join_warp();
  memcpy(&v, &m.warp().words[m.lane() ^ lanes][0], 4);
  m.join_warp();
  return v;
}

inline int atomic_add(int* at, int v) {
  emulated::check_aligned(at, 4);
  const int before = *at;
  *at += v;
  return before;
}
inline int load_relaxed(const int* at) { return *at; }

// ---- asynchronous copies ----

inline void copy_async(void* to, const void* from, bool there) {
  auto& m = emulated::machine();
  emulated::check_aligned(to, 16);
  emulated::check_aligned(from, 16);
  emulated::Copy copy{static_cast<unsigned char*>(to), {}};
  if (there) memcpy(copy.bytes, from, 16);
  memset(to, 0xFF, 16);
  if (m.coin())
    m.land(copy);
  else
    m.now->copies.push_back(copy);
}
inline void commit_copies() {
  auto& f = *emulated::machine().now;
  f.groups.push_back(std::move(f.copies));
  f.copies.clear();
}
template <int kBehind>
void wait_copies() {
  auto& m = emulated::machine();
  for (auto& groups = m.now->groups; groups.size() > kBehind; groups.pop_front())
    for (const auto& copy : groups.front()) m.land(copy);
}

// ---- products of a warp ----

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  auto& m = emulated::machine();
  emulated::check_aligned(row, 16);
  m.warp().rows[m.lane()] = static_cast<const unsigned char*>(row);
  m.join_warp();
  for (int i = 0; i < 4; ++i)
    memcpy(&r[i], m.warp().rows[i * 8 + m.lane() / 4] + m.lane() % 4 * 4, 4);
  m.join_warp();
}

template <bool kBf16>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  auto& m = emulated::machine();
  auto& words = m.warp().words;
  const int lane = m.lane();
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  memcpy(words[lane], mine, sizeof mine);
  m.join_warp();
  const auto half = [](uint32_t word, int which) {
    return emulated::from_16<kBf16>(static_cast<uint16_t>(word >> 16 * which));
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const int pair = k % 8 / 2;
      const float left = half(words[row % 8 * 4 + pair][row / 8 + k / 8 * 2], k % 2);
      const float right = half(words[column * 4 + pair][4 + k / 8], k % 2);
      sum += static_cast<double>(left) * right;
    }
    c[i] = static_cast<float>(sum);
  }
  m.join_warp();
}

// ---- Hopper ----

inline void barrier_init(uint64_t* barrier, int arrivals) {
  emulated::check_aligned(barrier, 8);
  emulated::machine().block->shared_barriers[barrier] = {arrivals, arrivals};
}
inline void barrier_init_done() {}
inline void barrier_arrive(uint64_t* barrier) {
  auto& m = emulated::machine();
  auto& b = m.block->shared_barrier(barrier);
  if (b.pending == 0) m.fail("more arrivals than a shared barrier expects");
  --b.pending;
  b.settle();
  m.progress = true;
}
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  emulated::machine().block->shared_barrier(barrier).bytes += bytes;
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  auto& m = emulated::machine();
  auto& b = m.block->shared_barrier(barrier);
  m.wait([&] { return b.phase != parity; });
}

struct TensorMap {
  const uint16_t* matrix;
  int64_t rows, width;
  int box_rows;
};

inline TensorMap tensor_map(const void* matrix, bool, int64_t rows, int64_t width, int box_rows) {
  emulated::check_aligned(matrix, 16);
  if (width % 8) throw std::runtime_error("a tensor map's rows are multiples of 16 bytes");
  if (box_rows > 256) throw std::runtime_error("a box has at most 256 rows");
  return {static_cast<const uint16_t*>(matrix), rows, width, box_rows};
}

inline void copy_box(void* to, const TensorMap* map, uint64_t* barrier, int column, int row) {
  auto& block = *emulated::machine().block;
  emulated::check_aligned(to, 1024);
  const int64_t offset = static_cast<unsigned char*>(to) - block.shared;
  // Here the map lies on the stack of a thread that may end before the copy.
  block.events.push_back([=, &block, map = *map] {
    for (int r = 0; r < map.box_rows; ++r)
      for (int c = 0; c < 64; ++c) {
        const bool there = row + r < map.rows && column + c < map.width;
        const uint16_t v = there ? map.matrix[(row + r) * map.width + column + c] : 0;
        const int64_t at = offset + r * 128 + ((c / 8 ^ r % 8) * 16) + c % 8 * 2;
        memcpy(block.shared + at, &v, 2);
        memcpy(block.async + at, &v, 2);
      }
    auto& b = block.shared_barrier(barrier);
    b.bytes -= map.box_rows * 128;
    b.settle();
  });
}
inline void prefetch_map(const TensorMap*) {}

inline void publish_writes() {
  auto& m = emulated::machine();
  for (unsigned char* at : m.now->written) memcpy(m.block->async + (at - m.block->shared), at, 16);
  m.now->written.clear();
}

template <int kRegisters>
void take_registers() {
  static_assert(kRegisters % 8 == 0);
}
template <int kRegisters>
void give_registers() {
  static_assert(kRegisters % 8 == 0);
}

inline uint64_t describe(const void* p) {
  emulated::check_aligned(p, 1024);
  return (static_cast<const unsigned char*>(p) - emulated::machine().block->shared) >> 4;
}
inline uint64_t along(uint64_t description, int bytes) { return description + (bytes >> 4); }

inline void products_begin() {}
inline void products_commit() {
  auto& f = *emulated::machine().now;
  f.product_groups.push_back(std::move(f.products));
  f.products.clear();
}
template <int kBehind>
void products_wait() {
  auto& groups = emulated::machine().now->product_groups;
  for (; groups.size() > kBehind; groups.pop_front()) emulated::take(groups.front());
}

inline void hold(float (&)[128]) {}

template <bool kBf16>
void multiply_group(float (&c)[128], uint64_t a, uint64_t b, bool add) {
  auto& m = emulated::machine();
  const int thread = threadIdx.x % 128;
  const auto element = [&m](uint64_t description, int row, int k) {
    const uint64_t linear = (description << 4) + row * 128 + k * 2;
    uint16_t bits;
    memcpy(&bits, m.block->async + (linear ^ (linear >> 3 & 0x70)), 2);
    return emulated::from_16<kBf16>(bits);
  };
  m.now->products.push_back([=, &c] {
    for (int i = 0; i < 128; ++i) {
      const int row = thread / 4 % 8 + i / 2 % 2 * 8 + thread / 32 * 16;
      const int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
      double sum = add ? c[i] : 0;
      for (int k = 0; k < 16; ++k)
        sum += static_cast<double>(element(a, row, k)) * element(b, column, k);
      c[i] = static_cast<float>(sum);
    }
  });
  if (m.coin()) return;
  for (auto& group : m.now->product_groups) emulated::take(group);
  emulated::take(m.now->products);
}

// ---- launch.h ----

using Stream = void*;

inline int multiprocessors() { return emulated::settings.multiprocessors; }
inline bool is_hopper() { return emulated::settings.hopper; }
inline int64_t shared_limit() { return emulated::kSharedBytes; }

struct Shape {
  int64_t blocks;
  int threads;
  int64_t shared = 0;
  bool together = false;
};

template <class Kernel>
int64_t most_together(Kernel*, int, int64_t shared) {
  return multiprocessors() * (shared_limit() / std::max<int64_t>(shared, 32 << 10));
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Shape& shape, Stream,
            const Arguments&... arguments) {
  if (shape.blocks < 1 || shape.blocks >= int64_t{1} << 31)
    throw std::runtime_error("a launch of " + std::to_string(shape.blocks) + " blocks");
  if (shape.shared > shared_limit()) throw std::runtime_error("too much shared memory");
  if (shape.together && shape.blocks > most_together(kernel, shape.threads, shape.shared))
    throw std::runtime_error("more blocks together than the device holds");
  emulated::machine().run(shape.blocks, shape.threads, shape.together,
                          [&] { kernel(arguments...); });
}

inline void zero(void* at, int64_t bytes, Stream) { memset(at, 0, bytes); }

}  // namespace saesteer::cuda
