#include "traffic.h"

#include <algorithm>
#include <set>
#include <tuple>

namespace ptx {

namespace {

constexpr int kSector = 32, kBanks = 32, kWord = 4;

int64_t parts_of(const std::vector<Request>& lanes, int size) {
  std::set<uint64_t> parts;
  for (const Request& r : lanes)
    for (uint64_t at = r.address / size; at <= (r.address + r.bytes - 1) / size; ++at)
      parts.insert(at);
  return static_cast<int64_t>(parts.size());
}

// Of lanes that are served at once: the most words that any bank must give.
int64_t passes(const Request* lanes, size_t count) {
  std::set<uint64_t> words;
  for (size_t l = 0; l < count; ++l)
    for (int b = 0; b < lanes[l].bytes; b += kWord) words.insert((lanes[l].address + b) / kWord);
  int64_t of_bank[kBanks] = {}, most = 0;
  for (const uint64_t word : words) most = std::max(most, ++of_bank[word % kBanks]);
  return most;
}

}  // namespace

void Traffic::count(const std::string& kernel, int line) {
  for (int kind = 0; kind < 4; ++kind) {
    std::vector<Request>& lanes = lanes_[kind];
    if (lanes.empty()) continue;
    Count& count = counts_[{kernel, line, kind}];
    ++count.runs;
    for (const Request& r : lanes) count.bytes += r.bytes;
    if (kind == shared) {
      // 128 bytes at a time: 8 lanes of 16 bytes each
      const size_t at_once = std::max<size_t>(1, kBanks * kWord / std::max(kWord, lanes[0].bytes));
      for (size_t l = 0; l < lanes.size(); l += at_once, ++count.fewest)
        count.parts += passes(&lanes[l], std::min(at_once, lanes.size() - l));
    } else {
      count.parts += parts_of(lanes, kSector);
      count.fewest += (parts_of(lanes, 1) + kSector - 1) / kSector;
    }
    lanes.clear();
  }
}

std::string Traffic::told() const {
  std::string text;
  for (const auto& [key, count] : counts_) {
    text += key.kernel;
    for (const int64_t n :
         {int64_t{key.line}, int64_t{key.kind}, count.runs, count.bytes, count.parts, count.fewest})
      text += ' ' + std::to_string(n);
    text += '\n';
  }
  return text;
}

}  // namespace ptx
