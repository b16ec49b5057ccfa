// Tokens packed for the machine's tiles, where it has them, so that many blocks of W_enc meet them.
#pragma once

#include <memory>
#include <vector>

#include "blocks.h"
#include "parallel.h"

namespace saesteer::cpu {

class Panel {
 public:
  static constexpr int kMost = kMostGroups * kGroupTokens;

  static bool serves(const Rows& x, const Rows& W) {
    return tiles() != nullptr && x.dtype == Dtype::bf16 && W.dtype == Dtype::bf16;
  }
  // Tokens that fit so many bytes: whole tiles, one at least.
  static int64_t most(int64_t a_token, int64_t bytes) {
    constexpr int64_t kTile = kGroupTokens / 2;
    const int64_t fit = bytes / std::max<int64_t>(1, a_token) / kTile * kTile;
    return std::min<int64_t>(kMost, std::max(kTile, fit));
  }

  // Takes count <= kMost tokens.
  Panel(const Rows& x, const int64_t* tokens, int64_t count)
      : width_(x.width), count_(count), lines_(new Line[count * packed_bytes(width_) / kLine]) {
    parallel(groups(), [&](Pieces& pieces, int64_t) {
      for (int64_t g; pieces.take(g);) {
        const void* rows[kGroupTokens];
        for (int i = 0; i < size(g); ++i) rows[i] = x[tokens[g * kGroupTokens + i]];
        tiles()->pack(rows, size(g), width_, packed(g));
      }
    });
  }

  // p[i * kBlock + j] of n rows, for every token i. w as Tiles::dots has it.
  void dots(const void* const* w, int n, const float* bias, float* p) const {
    Group all[kMostGroups];
    for (int64_t g = 0; g < groups(); ++g) all[g] = group(g, p);
    tiles()->dots(all, static_cast<int>(groups()), w, n, width_, bias);
  }

  // For the tokens of `open`, in ascending order, and those in a group with one of them.
  void dots(const void* const* w, int n, const float* bias, const std::vector<size_t>& open,
            float* p) const {
    Group chosen[kMostGroups];
    int count = 0;
    int64_t last = -1;
    for (const size_t i : open) {
      const int64_t g = i / kGroupTokens;
      if (g != last) chosen[count++] = group(last = g, p);
    }
    tiles()->dots(chosen, count, w, n, width_, bias);
  }

 private:
  static constexpr int64_t kLine = 64;
  struct alignas(kLine) Line {
    char bytes[kLine];
  };

  int64_t groups() const { return parts(count_, kGroupTokens); }
  int size(int64_t g) const {
    return static_cast<int>(std::min<int64_t>(kGroupTokens, count_ - g * kGroupTokens));
  }
  Group group(int64_t g, float* p) const {
    return {packed(g), size(g), p + g * kGroupTokens * kBlock};
  }
  Line* packed(int64_t g) const {
    return lines_.get() + g * kGroupTokens * packed_bytes(width_) / kLine;
  }

  const int64_t width_, count_;
  const std::unique_ptr<Line[]> lines_;
};

}  // namespace saesteer::cpu
