// Loads, stores, atomics and copies of a thread's own.
#include <algorithm>

#include "machine.h"
#include "numbers.h"

namespace ptx {

namespace {

Space space_of(const Instruction& i) {
  if (i.words[0] == "cp") return Space::copy;
  if (i.has("global")) return Space::global;
  if (i.has("shared") || i.has("shared::cta") || i.has("shared::cluster")) return Space::shared;
  return i.has("param") ? Space::parameter : Space::generic;
}

bool is_strong(const Instruction& i) {
  if (i.has("cta") && i.space != Space::shared) return false;  // not to other blocks
  for (const char* word : {"relaxed", "acquire", "release", "acq_rel", "volatile", "atom", "red"})
    if (i.has(word)) return true;
  return false;
}

// What others have released at an address, and what this warp releases there.
void acquire(Warp& w, const Instruction& i, const void* at) {
  const auto found = w.block.grid.released.find(reinterpret_cast<uintptr_t>(at));
  if (found == w.block.grid.released.end()) return;
  if (i.has("acquire") || i.has("acq_rel"))
    w.agent.take(found->second);
  else
    join(w.agent.met, found->second.seen);
}

void release(Warp& w, const Instruction& i, const void* at, bool adds) {
  Clocks& there = w.block.grid.released[reinterpret_cast<uintptr_t>(at)];
  if (!adds) there = {};
  if (i.has("release") || i.has("acq_rel"))
    there.gather(w.agent);
  else
    join(there.seen, w.agent.fenced);
}

int register_at(const Operand& o, int element) { return o.list.empty() ? o.reg : o.list[element]; }

template <class T>
Outcome load(Warp& w, const Instruction& i, uint32_t lanes) {
  const int count = i.variant;
  each(lanes, [&](int l) {
    const unsigned char* from = w.access(i, 1, l, count * sizeof(T), false);
    for (int e = 0; e < count; ++e) {
      T v;
      memcpy(&v, from + e * sizeof(T), sizeof v);
      const int to = register_at(i.operands[0], e);
      if (to >= 0) w.put<T>(to, l, v);
    }
    if (i.strong) acquire(w, i, from);
  });
  return Outcome::done;
}

template <class T>
Outcome store(Warp& w, const Instruction& i, uint32_t lanes) {
  const int count = i.variant;
  each(lanes, [&](int l) {
    T v[4];
    for (int e = 0; e < count; ++e) v[e] = w.get<T>(register_at(i.operands[1], e), l);
    unsigned char* to = w.access(i, 0, l, count * sizeof(T), true, v);
    memcpy(to, v, count * sizeof(T));
    if (i.strong) release(w, i, to, false);
  });
  if (i.strong) w.agent.tick();
  return Outcome::done;
}

// ---- atom and red ----

template <class T>
T updated(const std::string& how, T old, T b, T c) {
  if (how == "add") return static_cast<T>(static_cast<uint64_t>(old) + static_cast<uint64_t>(b));
  if (how == "and") return old & b;
  if (how == "or") return old | b;
  if (how == "xor") return old ^ b;
  if (how == "min") return std::min(old, b);
  if (how == "max") return std::max(old, b);
  if (how == "exch") return b;
  return old == b ? c : old;  // cas
}

const char* const kUpdates[] = {"add", "and", "or", "xor", "min", "max", "exch", "cas"};

template <class T>
Outcome atomic(Warp& w, const Instruction& i, uint32_t lanes) {
  const int at = i.words[0] == "atom";  // red gives nothing
  const std::string how = kUpdates[i.variant];
  each(lanes, [&](int l) {
    unsigned char* p = w.access(i, at, l, sizeof(T), true);
    T old;
    memcpy(&old, p, sizeof old);
    const T b = w.get<T>(i.operands[at + 1].reg, l);
    const T c = how == "cas" ? w.get<T>(i.operands[at + 2].reg, l) : T{};
    const T v = updated(how, old, b, c);
    memcpy(p, &v, sizeof v);
    if (at && i.operands[0].reg >= 0) w.put<T>(i.operands[0].reg, l, old);
    acquire(w, i, p);
    release(w, i, p, true);
  });
  w.agent.tick();
  return Outcome::done;
}

// ---- addresses ----

Outcome convert_address(Warp& w, const Instruction& i, uint32_t lanes) {
  const bool to = i.has("to");
  const auto base = i.has("global")  ? 0
                    : i.has("param") ? reinterpret_cast<uintptr_t>(w.block.grid.arguments.data())
                                     : reinterpret_cast<uintptr_t>(w.block.memory) - kSharedBase;
  each(lanes, [&](int l) {
    const auto a = w.get<uint64_t>(i.operands[1].reg, l);
    w.put<uint64_t>(i.operands[0].reg, l, to ? a - base : a + base);
  });
  return Outcome::done;
}

// ---- cp.async: of each thread's own ----

// A bulk prefetch: seen in the traffic only, but what it names has to be there.
Outcome fetch_ahead(Warp& w, const Instruction& i, uint32_t lanes) {
  each(lanes, [&](int l) {
    const auto& o = i.operands;
    const uint64_t from = w.get<uint64_t>(o[0].reg, l) + o[0].offset;
    const uint64_t bytes = w.get<uint32_t>(o[1].reg, l);
    if (from % 16 || bytes % 16) throw std::runtime_error("a misaligned prefetch");
    const auto* at = reinterpret_cast<const volatile unsigned char*>(from);
    for (uint64_t b = 0; b < bytes; b += 16) (void)at[b];
    w.block.grid.traffic->lane(Traffic::ahead, reinterpret_cast<const void*>(from), bytes);
  });
  return Outcome::done;
}

void land(const Copy& copy) { memcpy(copy.to, copy.bytes, copy.count); }

Outcome copy_async(Warp& w, const Instruction& i, uint32_t lanes) {
  const auto& o = i.operands;
  Grid& grid = w.block.grid;
  if (!w.copying) w.copying = std::make_shared<Flight>(grid.races, w.agent);
  Agent& copying = w.copying->agent;
  copying.take(w.agent);
  std::swap(copying, w.agent);  // it is the copy that reads and writes
  each(lanes, [&](int l) {
    const int bytes = static_cast<int>(w.get<uint32_t>(o[2].reg, l));
    const int there = o.size() > 3 ? static_cast<int>(w.get<uint32_t>(o[3].reg, l)) : bytes;
    if (there < 0 || there > bytes) throw std::runtime_error("more bytes than the copy has");
    Copy copy{w.access(i, 0, l, bytes, true), {}, bytes};
    if (there) memcpy(copy.bytes, w.access(i, 1, l, there, false), there);
    memset(copy.to, 0xFF, bytes);
    if (grid.coin())
      land(copy);
    else
      w.copies[l].push_back(copy);
  });
  std::swap(copying, w.agent);
  return Outcome::done;
}

Outcome commit_copies(Warp& w, const Instruction&, uint32_t lanes) {
  each(lanes, [&](int l) {
    w.copy_groups[l].push_back({w.copying, std::move(w.copies[l])});
    w.copies[l].clear();
  });
  w.copying = nullptr;
  return Outcome::done;
}

Outcome wait_copies(Warp& w, const Instruction& i, uint32_t lanes) {
  const size_t behind = w.uniform(i.operands[0].reg);
  each(lanes, [&](int l) {
    for (auto& groups = w.copy_groups[l]; groups.size() > behind; groups.pop_front()) {
      for (const Copy& copy : groups.front().copies) land(copy);
      if (const auto& flight = groups.front().flight) w.agent.take(flight->agent);
    }
  });
  return Outcome::done;
}

}  // namespace

unsigned char* Warp::shared(uint64_t address, int64_t bytes) const {
  const auto from = static_cast<int64_t>(address) - kSharedBase;
  if (from < 0 || from + bytes > block.bytes)
    throw std::runtime_error("outside of the block's shared memory: byte " + std::to_string(from));
  return block.memory + from;
}

unsigned char* Warp::access(const Instruction& i, int operand, int lane, int bytes, bool write,
                            const void* written) {
  const Operand& o = i.operands[operand];
  const Space space = i.space != Space::copy ? i.space : operand ? Space::global : Space::shared;
  const bool is_shared = space == Space::shared;
  const uint64_t address =
      (is_shared ? get<uint32_t>(o.reg, lane) : get<uint64_t>(o.reg, lane)) + o.offset;
  if (address % bytes) throw std::runtime_error("a misaligned access");
  auto& arguments = block.grid.arguments;
  if (space == Space::parameter) {
    if (address + bytes > arguments.size()) throw std::runtime_error("outside of the parameters");
    return arguments.data() + address;
  }
  auto* at = is_shared ? shared(address, bytes) : reinterpret_cast<unsigned char*>(address);
  if (space == Space::global && block.contains(at))
    throw std::runtime_error("shared memory, taken for global");
  if (at >= arguments.data() && at < arguments.data() + arguments.size()) return at;
  Traffic& traffic = *block.grid.traffic;
  if (block.contains(at))
    traffic.lane(Traffic::shared, at, bytes);
  else
    traffic.lane(write ? Traffic::write : Traffic::read, at, bytes);
  Races& races = block.grid.races;
  if (!write && block.contains(at)) races.require_written(at, bytes);
  const bool changes = !written || memcmp(at, written, bytes);
  races.touch(at, bytes,
              {agent, write, i.strong, false, lane, step, syncs, i.line, changes, i.constant});
  return at;
}

Handler memory(Instruction& i) {
  const std::string &op = i.words[0], &type = i.words.back();
  i.space = space_of(i), i.strong = is_strong(i), i.constant = i.has("nc");
  if (op == "cvta") return convert_address;
  if (op == "prefetch") return nothing;
  if (op == "cp") {
    if (i.has("commit_group")) return commit_copies;
    if (i.has("wait_group")) return wait_copies;
    if (i.has("bulk")) return i.has("prefetch") && i.has("global") ? fetch_ahead : nullptr;
    return i.has("mbarrier") ? nullptr : copy_async;
  }
  if (op == "ld" || op == "st") {
    i.variant = i.has("v4") ? 4 : i.has("v2") ? 2 : 1;
    return with_number(type, [&](auto t) -> Handler {
      using T = typename decltype(t)::type;
      return op == "ld" ? load<T> : store<T>;
    });
  }
  for (i.variant = 0; i.variant < 8 && !i.has(kUpdates[i.variant]);) ++i.variant;
  if (i.variant == 8) return nullptr;
  return with_integer(type, [](auto t) -> Handler { return atomic<typename decltype(t)::type>; });
}

}  // namespace ptx
