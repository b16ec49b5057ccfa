#include "machine.h"

#include <algorithm>
#include <utility>

namespace ptx {

namespace {

constexpr int64_t kSharedBytes = 228 << 10;
// Instructions: a launch that takes more does not end.
constexpr int64_t kMost = int64_t{1} << 24;

std::string place(const Warp& w, const Instruction& i) {
  return w.block.grid.kernel.name + ", block " + std::to_string(w.block.index) + ", warp " +
         std::to_string(w.index) + ", line " + std::to_string(i.line) + " of the PTX: " + i.text;
}

}  // namespace

void PhaseBarrier::settle() {
  if (pending || bytes) return;
  pending = expected;
  phase ^= 1;
  completed = gathered;
}

// ---- a warp ----

Warp::Warp(Block& b, int i, uint32_t lanes, Agent a)
    : block(b), index(i), alive(lanes), agent(std::move(a)) {
  const Kernel& k = b.grid.kernel;
  const size_t count = k.registers + k.constants.size();
  if (k.multiplies) locked.assign(count, 0), used.assign(count, 1);
  auto& unused = b.grid.unused_registers;
  if (unused.empty()) {
    registers.assign(count * kWarp, 0xFFFFFFFFFFFFFFFF);
  } else {  // as they were left, as on a GPU
    registers = std::move(unused.back());
    unused.pop_back();
  }
  load_constants();
}

Warp::~Warp() { block.grid.unused_registers.push_back(std::move(registers)); }

void Warp::load_constants() {
  const Grid& grid = block.grid;
  for (size_t c = 0; c < grid.kernel.constants.size(); ++c) {
    const Constant& constant = grid.kernel.constants[c];
    uint64_t* lanes = &registers[(grid.kernel.registers + c) * kWarp];
    const auto value = static_cast<int64_t>(constant.value);
    if (constant.kind == Constant::special)
      special(constant.name, lanes);
    else if (constant.kind == Constant::shared)  // the dynamic memory follows the static
      std::fill_n(lanes, kWarp, kSharedBase + (value < 0 ? block.dynamic() : value));
    else
      std::fill_n(lanes, kWarp, constant.value);
  }
}

void Warp::special(const std::string& name, uint64_t* lanes) const {
  const Grid& grid = block.grid;
  const uint32_t x = grid.threads[0], y = grid.threads[1];
  const uint64_t workspace = grid.together ? reinterpret_cast<uint64_t>(grid.workspace.data()) : 0;
  const std::map<std::string, uint64_t> same = {
      {"%ntid.x", x},
      {"%ntid.y", y},
      {"%ntid.z", grid.threads[2]},
      {"%ctaid.x", block.x},
      {"%ctaid.y", block.y},
      {"%ctaid.z", block.z},
      {"%nctaid.x", grid.blocks[0]},
      {"%nctaid.y", grid.blocks[1]},
      {"%nctaid.z", grid.blocks[2]},
      {"%warpid", index},
      {"%envreg1", workspace >> 32},
      {"%envreg2", workspace & 0xFFFFFFFF},
  };
  const auto found = same.find(name);
  for (uint32_t lane = 0; lane < kWarp; ++lane) {
    const uint32_t thread = index * kWarp + lane;
    if (found != same.end())
      lanes[lane] = found->second;
    else if (name == "%tid.x")
      lanes[lane] = thread % x;
    else if (name == "%tid.y")
      lanes[lane] = thread / x % y;
    else if (name == "%tid.z")
      lanes[lane] = thread / x / y;
    else if (name == "%laneid")
      lanes[lane] = lane;
    else
      throw std::runtime_error("PTX: no special register " + name);
  }
}

bool Warp::run(int most) {
  bool any = false;
  for (; most > 0 && alive && step_once(); --most) any = true;
  return any;
}

// The lanes that come next, and where they are.
uint32_t Warp::next(int& at) {
  if (together >= 0) {
    at = together;
    return alive;
  }
  const uint32_t ready = alive & ~parked;
  if (!ready) {
    const Instruction& i = block.grid.kernel.code[where()];
    throw std::runtime_error("lanes wait for each other, at " + place(*this, i));
  }
  at = INT32_MAX;
  each(ready, [&](int lane) { at = std::min(at, pc[lane]); });
  uint32_t here = 0;
  each(alive, [&](int lane) { here |= static_cast<uint32_t>(pc[lane] == at) << lane; });
  return here;
}

// The lanes of a mask are at `at`; the others stay.
void Warp::move(uint32_t lanes, int at) {
  if (lanes == alive) {
    together = at;
    return;
  }
  if (together >= 0) pc.fill(std::exchange(together, -1));
  each(lanes, [&](int lane) { pc[lane] = at; });
}

// Of these lanes, those that run the instruction.
uint32_t Warp::guarded(const Instruction& i, uint32_t lanes) const {
  uint32_t runs = lanes;
  if (i.guard >= 0)
    each(lanes, [&](int lane) {
      if (!holds(i.guard, i.guard_negated, lane)) runs &= ~(1u << lane);
    });
  return runs;
}

// Whether all lanes that an instruction needs are here; if not, these wait for the others.
bool Warp::meet(const Instruction& i, uint32_t here, uint32_t runs) {
  const uint32_t needed =
      i.aligned ? alive : get<uint32_t>(i.operands.back().reg, __builtin_ctz(here));
  if (needed & ~here) {
    parked |= here;
    return false;
  }
  if (needed & ~runs) throw std::runtime_error("not by all lanes: " + place(*this, i));
  parked &= ~needed;
  return true;
}

bool Warp::step_once() {
  const auto& code = block.grid.kernel.code;
  int at;
  const uint32_t here = next(at);
  if (at >= static_cast<int>(code.size())) {
    alive &= ~here;
    return true;
  }
  const Instruction& i = code[at];
  uint32_t runs = guarded(i, here);
  if (at == block.grid.left_out) runs = 0, ++block.grid.times_left_out;
  if ((i.aligned || i.members) && runs && !meet(i, here, runs)) return true;
  ++step;
  if (++block.grid.steps > kMost) throw std::runtime_error("it does not end: " + place(*this, i));
  if (!used.empty() && i.words[0] != "wgmma") follow(i);
  Outcome outcome = Outcome::done;
  try {
    if (runs) outcome = i.run(*this, i, runs);
  } catch (const std::runtime_error& e) {
    throw std::runtime_error(std::string(e.what()) + "; at " + place(*this, i));
  }
  if (outcome == Outcome::wait) return false;
  block.grid.traffic->end(block.grid.kernel.name, i.line);
  if (outcome == Outcome::jumped && runs == here) {
    move(here, i.target);
  } else {
    move(here & alive, at + 1);
    if (outcome == Outcome::jumped && runs) move(runs, i.target);
  }
  return true;
}

// Registers of products: they are not used in flight, and after a use a fence comes first.
void Warp::follow(const Instruction& i) {
  const auto use = [&](int reg) {
    if (reg < 0) return;
    if (locked[reg])
      throw std::runtime_error("a register that a product in flight writes: " + place(*this, i));
    used[reg] = step;
  };
  for (const Operand& o : i.operands) {
    use(o.reg), use(o.second);
    for (const int reg : o.list) use(reg);
  }
}

// ---- a block ----

Block::Block(Grid& g, int64_t i)
    : grid(g),
      index(i),
      x(static_cast<uint32_t>(i % g.blocks[0])),
      y(static_cast<uint32_t>(i / g.blocks[0] % g.blocks[1])),
      z(static_cast<uint32_t>(i / g.blocks[0] / g.blocks[1])),
      storage(static_cast<unsigned char*>(aligned_alloc(1024, kSharedBytes)), free),
      memory(storage.get()),
      bytes(dynamic() + g.shared) {
  if (bytes > kSharedBytes) throw std::runtime_error("more shared memory than a block can have");
  memset(memory, 0xFF, bytes);
  grid.races.forget(memory, bytes);
  const int threads = g.threads_of_block(), warps_here = g.warps_of_block();
  for (int w = 0; w < warps_here; ++w) {
    const int lanes = std::min(threads - w * kWarp, kWarp);
    const uint32_t mask = lanes == kWarp ? kEveryLane : (1u << lanes) - 1;
    const int id = static_cast<int>(i) * warps_here + w;
    warps.push_back(std::make_unique<Warp>(*this, w, mask, g.races.warp(id)));
  }
}

bool Block::is_done() const {
  return std::all_of(warps.begin(), warps.end(), [](const auto& w) { return !w->alive; });
}

void Block::require_landed() const {
  bool landed = events.empty();
  for (const auto& w : warps) {
    landed &= w->product_groups.empty() && w->products.empty();
    for (int lane = 0; lane < kWarp; ++lane) {
      landed &= w->copies[lane].empty();
      for (const CopyGroup& group : w->copy_groups[lane]) landed &= group.copies.empty();
    }
  }
  if (!landed) throw std::runtime_error("a block ends before its copies or products");
}

PhaseBarrier& Block::phase_barrier(uint64_t address) {
  const auto found = phase_barriers.find(address);
  if (found == phase_barriers.end())
    throw std::runtime_error("an mbarrier that was not initialised");
  return found->second;
}

// ---- a grid ----

void Grid::run() {
  races.begin(static_cast<int>(count() * warps_of_block()));
  const int64_t most = together ? count() : 1 + static_cast<int64_t>(random() % 4);
  std::vector<std::unique_ptr<Block>> resident;
  for (int64_t next = 0; next < count() || !resident.empty();) {
    while (next < count() && static_cast<int64_t>(resident.size()) < most)
      resident.push_back(std::make_unique<Block>(*this, next++));
    bool any = false;
    const size_t start = random();
    for (size_t i = 0; i < resident.size(); ++i)
      any |= turn(*resident[(start + i) % resident.size()]);
    if (!any) fail_waiting(resident);
    for (const auto& b : resident)
      if (b->is_done()) b->require_landed();
    resident.erase(std::remove_if(resident.begin(), resident.end(),
                                  [](const auto& b) { return b->is_done(); }),
                   resident.end());
  }
}

// Every warp's turn, and perhaps a tensor copy lands.
bool Grid::turn(Block& block) {
  bool any = false;
  const size_t start = random();
  for (size_t i = 0; i < block.warps.size(); ++i) {
    Warp& w = *block.warps[(start + i) % block.warps.size()];
    if (w.alive) any |= w.run(1 << random() % 10);
  }
  if (!block.events.empty() && (!any || coin())) {
    const size_t which = random() % block.events.size();
    const auto event = std::move(block.events[which]);
    block.events.erase(block.events.begin() + static_cast<std::ptrdiff_t>(which));
    event();
    any = true;
  }
  return any;
}

void Grid::fail_waiting(const std::vector<std::unique_ptr<Block>>& resident) const {
  for (const auto& b : resident)
    for (const auto& w : b->warps)
      if (w->alive)
        throw std::runtime_error("it waits for ever: " + place(*w, kernel.code[w->where()]));
  throw std::runtime_error(kernel.name + " has nothing left that runs");
}

}  // namespace ptx
