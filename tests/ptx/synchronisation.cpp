// Branches, barriers, fences, and what lanes tell each other.
#include <utility>

#include "machine.h"
#include "numbers.h"

namespace ptx {

namespace {

Outcome branch(Warp&, const Instruction&, uint32_t) { return Outcome::jumped; }

Outcome leave(Warp& w, const Instruction&, uint32_t lanes) {
  w.alive &= ~lanes;
  return Outcome::done;
}

Outcome trap(Warp&, const Instruction&, uint32_t) { throw std::runtime_error("a trap"); }

// ---- barriers of a block ----

int holding(const Warp& w, const Operand& o, uint32_t lanes) {
  int count = 0;
  each(lanes, [&](int l) { count += w.holds(o, l); });
  return count;
}

// bar.sync name{, threads}, bar.red.or.pred and bar.red.popc.u32 result, name{, threads}, value
Outcome barrier(Warp& w, const Instruction& i, uint32_t lanes) {
  const bool reduces = i.has("red");
  const auto& o = i.operands;
  const size_t counts = o.size() - (reduces ? 1 : 0);
  Barrier& b = w.block.barriers[w.uniform(o[reduces].reg)];
  if (!w.at_barrier) {
    const auto expected = counts > size_t{reduces} + 1
                              ? static_cast<int>(w.uniform(o[reduces + 1].reg))
                              : w.block.grid.warps_of_block() * kWarp;
    if (expected % kWarp) throw std::runtime_error("a barrier of parts of warps");
    w.at_barrier = true;
    w.generation = b.generation;
    b.gathered.gather(w.agent);
    if (reduces) b.holding += holding(w, o.back(), lanes);
    b.arrived += kWarp;
    if (b.arrived > expected) throw std::runtime_error("more threads than the barrier expects");
    if (b.arrived == expected) {
      b.arrived = 0;
      b.result = std::exchange(b.holding, 0);
      b.released = std::exchange(b.gathered, {});
      ++b.generation;
    }
  }
  if (w.generation == b.generation) return Outcome::wait;
  w.at_barrier = false;
  w.agent.take(b.released);
  w.agent.tick();
  ++w.syncs;
  if (!reduces) return Outcome::done;
  each(lanes, [&](int l) {
    if (i.has("or"))
      w.put(o[0].reg, l, Predicate{b.result > 0});
    else
      w.put(o[0].reg, l, static_cast<uint32_t>(b.result));
  });
  return Outcome::done;
}

Outcome sync_warp(Warp& w, const Instruction&, uint32_t) {
  ++w.syncs;
  return Outcome::done;
}

// ---- fences ----

Outcome fence(Warp& w, const Instruction&, uint32_t) {
  w.agent.fenced = w.agent.seen;
  join(w.agent.seen, w.agent.met);
  w.agent.tick();
  return Outcome::done;
}

Outcome fence_proxy(Warp& w, const Instruction&, uint32_t) {
  w.agent.published = w.agent.seen;
  w.agent.tick();
  return Outcome::done;
}

// ---- among the lanes of a warp ----

enum Shuffle { kUp, kDown, kBfly, kIdx };
const char* const kShuffles[] = {"up", "down", "bfly", "idx"};

Outcome shuffle(Warp& w, const Instruction& i, uint32_t lanes) {
  const auto& o = i.operands;
  std::array<uint32_t, kWarp> from{};
  each(lanes, [&](int l) { from[l] = w.get<uint32_t>(o[1].reg, l); });
  each(lanes, [&](int l) {
    const auto b = static_cast<int>(w.get<uint32_t>(o[2].reg, l) & 0x1F);
    const uint32_t c = w.get<uint32_t>(o[3].reg, l);
    const int segment = c >> 8 & 0x1F, clamp = c & 0x1F;
    const int most = (l & segment) | (clamp & ~segment), least = l & segment;
    int source = i.variant == kUp     ? l - b
                 : i.variant == kDown ? l + b
                 : i.variant == kBfly ? l ^ b
                                      : least | (b & ~segment);
    const bool inside = i.variant == kUp ? source >= most : source <= most;
    if (!inside) source = l;
    if (!(lanes >> source & 1)) throw std::runtime_error("a shuffle from a lane that is not there");
    w.put(o[0].reg, l, from[source]);
    if (o[0].second >= 0) w.put(o[0].second, l, Predicate{inside});
  });
  return Outcome::done;
}

Outcome elect(Warp& w, const Instruction& i, uint32_t lanes) {
  const int chosen = __builtin_ctz(lanes);
  each(lanes, [&](int l) {
    if (i.operands[0].reg >= 0) w.put<uint32_t>(i.operands[0].reg, l, chosen);
    w.put(i.operands[0].second, l, Predicate{l == chosen});
  });
  return Outcome::done;
}

template <class T>
Outcome reduce(Warp& w, const Instruction& i, uint32_t lanes) {
  T v = w.get<T>(i.operands[1].reg, __builtin_ctz(lanes));
  each(lanes & (lanes - 1), [&](int l) {
    const T other = w.get<T>(i.operands[1].reg, l);
    v = i.has("add")   ? static_cast<T>(static_cast<uint64_t>(v) + static_cast<uint64_t>(other))
        : i.has("min") ? std::min(v, other)
        : i.has("max") ? std::max(v, other)
        : i.has("and") ? static_cast<T>(v & other)
        : i.has("or")  ? static_cast<T>(v | other)
                       : static_cast<T>(v ^ other);
  });
  each(lanes, [&](int l) { w.put(i.operands[0].reg, l, v); });
  return Outcome::done;
}

Outcome vote(Warp& w, const Instruction& i, uint32_t lanes) {
  uint32_t ballot = 0;
  const Operand& asked = i.operands[1];
  each(lanes, [&](int l) { ballot |= static_cast<uint32_t>(w.holds(asked, l)) << l; });
  each(lanes, [&](int l) {
    if (i.has("ballot"))
      w.put(i.operands[0].reg, l, ballot);
    else
      w.put(i.operands[0].reg, l, Predicate{i.has("any") ? ballot != 0 : ballot == lanes});
  });
  return Outcome::done;
}

// ---- mbarrier ----

uint64_t address(const Warp& w, const Operand& o, int lane) {
  return w.get<uint32_t>(o.reg, lane) + o.offset;
}

// Its eight bytes are written to by init, and by nobody else but barriers' own instructions.
void touch(Warp& w, const Instruction& i, uint64_t at, int lane, bool strong) {
  if (at % 8) throw std::runtime_error("a misaligned mbarrier");
  w.block.grid.races.touch(w.shared(at, 8), 8,
                           {w.agent, true, strong, false, lane, w.step, w.syncs, i.line});
}

Outcome init(Warp& w, const Instruction& i, uint32_t lanes) {
  each(lanes, [&](int l) {
    const uint64_t at = address(w, i.operands[0], l);
    touch(w, i, at, l, false);
    const auto count = static_cast<int>(w.get<uint32_t>(i.operands[1].reg, l));
    w.block.phase_barriers[at] = {count, count, 0, 0, {}, {}};
  });
  return Outcome::done;
}

Outcome invalidate(Warp& w, const Instruction& i, uint32_t lanes) {
  each(lanes, [&](int l) {
    const uint64_t at = address(w, i.operands[0], l);
    touch(w, i, at, l, false);
    if (!w.block.phase_barriers.erase(at)) throw std::runtime_error("no mbarrier is there");
  });
  return Outcome::done;
}

// arrive, arrive.expect_tx, expect_tx
Outcome arrive(Warp& w, const Instruction& i, uint32_t lanes) {
  const bool arrives = i.has("arrive"), releases = !i.has("relaxed");
  each(lanes, [&](int l) {
    const uint64_t at = address(w, i.operands[arrives], l);
    touch(w, i, at, l, true);
    PhaseBarrier& b = w.block.phase_barrier(at);
    if (i.has("expect_tx")) b.bytes += w.get<uint32_t>(i.operands.back().reg, l);
    if (!arrives) return;
    if (b.pending == 0) throw std::runtime_error("more arrivals than the mbarrier expects");
    if (releases) b.gathered.gather(w.agent);
    --b.pending;
    b.settle();
  });
  w.agent.tick();
  return Outcome::done;
}

Outcome try_wait(Warp& w, const Instruction& i, uint32_t lanes) {
  const auto& o = i.operands;
  const bool acquires = !i.has("relaxed");
  each(lanes, [&](int l) {
    const uint64_t at = address(w, o[1], l);
    const PhaseBarrier& b = w.block.phase_barrier(at);
    const bool ended = b.phase != (w.get<uint32_t>(o[2].reg, l) & 1);
    w.put(o[0].reg, l, Predicate{ended});
    if (!ended) return;
    touch(w, i, at, l, true);
    if (acquires) w.agent.take(b.completed);
  });
  return Outcome::done;
}

}  // namespace

Handler synchronisation(Instruction& i) {
  const std::string& op = i.words[0];
  if (op == "bra") return branch;
  if (op == "ret" || op == "exit") return leave;
  if (op == "trap") return trap;
  if (op == "setmaxnreg") return nothing;
  // One of the block orders nothing for others, and within it nobody relies on it.
  if ((op == "membar" || op == "fence") && i.has("cta")) return nullptr;
  if (op == "membar") return fence;
  if (op == "fence") {
    if (i.has("proxy")) return i.has("async") ? fence_proxy : nullptr;
    return i.has("mbarrier_init") ? nothing : fence;
  }
  if (op == "bar" && i.has("warp")) {
    i.members = true;
    return sync_warp;
  }
  if (op == "bar" || op == "barrier") {
    i.aligned = true;
    return i.has("sync") || (i.has("red") && (i.has("or") || i.has("popc"))) ? barrier : nullptr;
  }
  if (op == "mbarrier") {
    if (!i.has("b64") || i.has("noComplete")) return nullptr;
    if (i.has("init")) return init;
    if (i.has("inval")) return invalidate;
    if (i.has("try_wait") || i.has("test_wait")) return i.has("parity") ? try_wait : nullptr;
    // An arrival of several at once is not known here.
    if (i.has("arrive") && i.operands.size() != (i.has("expect_tx") ? 3 : 2)) return nullptr;
    return i.has("arrive") || i.has("expect_tx") ? arrive : nullptr;
  }
  i.members = true;
  if (op == "shfl") {
    while (!i.has(kShuffles[i.variant])) ++i.variant;
    return shuffle;
  }
  if (op == "elect") return elect;
  if (op == "vote") return vote;
  return with_integer(i.words.back(),
                      [](auto t) -> Handler { return reduce<typename decltype(t)::type>; });
}

}  // namespace ptx
