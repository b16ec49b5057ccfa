#include "races.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace ptx {

namespace {
// At once; a clock is as long as the copies that it knows of make it.
constexpr int kInFlight = 512;
constexpr int kPage = 1024, kMostGrain = 16;

uint32_t known(const Clock& clock, int agent) {
  return static_cast<size_t>(agent) < clock.size() ? clock[agent] : 0;
}
}  // namespace

void join(Clock& into, const Clock& other) {
  if (into.size() < other.size()) into.resize(other.size());
  for (size_t i = 0; i < other.size(); ++i) into[i] = std::max(into[i], other[i]);
}

void Races::begin(int warps) {
  if (warps + kInFlight > INT16_MAX) throw std::runtime_error("more warps than can be followed");
  pages_.clear(), last_ = nullptr;
  warps_ = warps;
  free_.clear();
  for (int i = kInFlight; i-- > 0;) free_.push_back(warps + i);
  times_.assign(warps + kInFlight, 0);
}

Agent Races::warp(int id) const {
  const Clock none(warps_);
  Agent agent{id, none, none, none, none};
  agent.tick();
  return agent;
}

Agent Races::fork(const Agent& from) {
  if (free_.empty()) throw std::runtime_error("too many copies and products in flight");
  Agent agent{free_.back(), from.seen, from.published, {}, {}};
  free_.pop_back();
  if (agent.seen.size() <= static_cast<size_t>(agent.id)) agent.seen.resize(agent.id + 1);
  agent.seen[agent.id] = ++times_[agent.id];
  return agent;
}

// Its shadows, of no more bytes each than `grain`.
Races::Page& Races::page(uintptr_t key, int grain) {
  if (!last_ || key != last_key_) last_ = &pages_[key], last_key_ = key;
  auto& [of, shadows] = *last_;
  if (shadows.empty()) {
    of = grain;
    shadows.resize(kPage / grain);
  } else if (of > grain) {
    std::vector<Shadow> finer;
    finer.reserve(kPage / grain);
    for (const Shadow& s : shadows) finer.insert(finer.end(), of / grain, s);
    shadows = std::move(finer);
    of = grain;
  }
  return *last_;
}

// f for every shadow of these bytes.
template <class F>
void Races::each_shadow(uintptr_t at, int bytes, const F& f) {
  // The largest power of two that divides the address, the size and kMostGrain
  const uintptr_t bits = at | bytes | kMostGrain;
  const int grain = static_cast<int>(bits & -bits);
  for (const uintptr_t end = at + bytes; at < end;) {
    Page& p = page(at / kPage, grain);
    const uintptr_t stop = std::min(end, (at / kPage + 1) * kPage);
    for (; at < stop; at += p.grain) f(p.shadows[at % kPage / p.grain]);
  }
}

void Races::forget(const void* at, int64_t bytes) {
  const auto from = reinterpret_cast<uintptr_t>(at);
  for (uintptr_t key = from / kPage; key * kPage < from + bytes; ++key) {
    const auto found = pages_.find(key);
    if (found != pages_.end()) found->second.shadows.clear();
  }
}

void Races::require_written(const void* at, int bytes) {
  each_shadow(reinterpret_cast<uintptr_t>(at), bytes, [](const Shadow& s) {
    if (s.write.agent < 0) throw std::runtime_error("shared memory that nobody has written");
  });
}

// Lanes of a warp are ordered by its barriers alone, and by being one access.
bool Races::before(const Touch& earlier, const Access& now) {
  if (earlier.agent < 0 || (earlier.strong && now.strong)) return true;
  if (earlier.agent != now.agent.id) return known(now.agent.seen, earlier.agent) >= earlier.time;
  return earlier.lane == now.lane || earlier.lane < 0 || now.lane < 0 || earlier.step == now.step ||
         earlier.syncs != now.syncs;
}

void Races::touch(const void* at, int bytes, const Access& now) {
  const auto from = reinterpret_cast<uintptr_t>(at);
  const Touch mine{now.agent.seen[now.agent.id],
                   now.step,
                   now.syncs,
                   now.line,
                   static_cast<int16_t>(now.agent.id),
                   static_cast<int8_t>(now.lane),
                   now.strong,
                   now.async};
  each_shadow(from, bytes, [&](Shadow& s) {
    s.constant |= now.constant;
    if (s.constant && (now.write ? now.changes : s.write.agent >= 0))
      throw std::runtime_error("written, and read past coherence, in one kernel");
    if (!before(s.write, now)) {
      if (!now.changes || (copies_differ && now.write && s.write.line == now.line)) return;
      fail(s.write, true, now, "at the same time");
    }
    if (now.async && s.write.agent >= 0 && !s.write.async &&
        known(now.agent.published, s.write.agent) < s.write.time)
      fail(s.write, true, now, "without a proxy fence between");
    if (now.write) {
      for (Touch& read : s.reads) {
        if (!before(read, now) && now.changes) fail(read, false, now, "at the same time");
        read.agent = -1;
      }
      s.write = mine;
      return;
    }
    // In place of a read that this one comes after, or of any
    Touch* place = &s.reads[turn_++ % s.reads.size()];
    for (Touch& read : s.reads)
      if (read.agent < 0 || (read.agent == now.agent.id && read.lane == now.lane)) place = &read;
    *place = mine;
  });
}

void Races::fail(const Touch& earlier, bool wrote, const Access& now, const char* how) {
  const auto told = [](bool write, int line, int agent, int lane) {
    return std::string(write ? "a write" : "a read") + " (line " + std::to_string(line) +
           " of the PTX, warp or copy " + std::to_string(agent) + ", lane " + std::to_string(lane) +
           ")";
  };
  throw std::runtime_error("a race: " + told(wrote, earlier.line, earlier.agent, earlier.lane) +
                           " and " + told(now.write, now.line, now.agent.id, now.lane) + ", " +
                           how);
}

}  // namespace ptx
