// The decision ladder, a chunk of tokens at a time: the dot products, then the counts that decide.
#include "measure.h"

#include <cmath>
#include <memory>
#include <numeric>
#include <optional>

#include "blocks.h"
#include "panel.h"
#include "spans.h"
#include "tokens.h"

namespace saesteer::cpu {
namespace {

// What is kept of a token while it is measured: activations and counts, lists of those undecided,
// and one list more a thread.
int64_t kept_bytes(const Encoder& encoder, int64_t features) {
  return 8 * features + 48 + 8 * workers_for(blocks(encoder));
}

// Tokens measured at once, so that what is kept of them stays below half a megabyte.
int64_t chunk_tokens(const Encoder& encoder, int64_t features) {
  return std::max<int64_t>(64, (int64_t{1} << 19) / kept_bytes(encoder, features));
}

// Tokens that pass over W together, so that theirs stay in the second- and third-level caches: each
// block of W meets all of them before the next one comes. `spare` bytes are left for copies.
int64_t most_at_once(const Rows& x, const Rows& W, int64_t spare) {
  if (Panel::serves(x, W)) return Panel::most(packed_bytes(x.width), spare);
  const int64_t a_token = std::max<int64_t>(1, x.width * bytes(x.dtype));
  return std::max<int64_t>(64, (int64_t{4} << 20) / a_token);
}

// The rows and biases of the features, gathered once a call.
struct FeatureRows {
  FeatureRows(const Encoder& encoder, const Features& features)
      : rows(features.count + kRowsAhead), bias(features.count) {
    for (int64_t f = 0; f < features.count; ++f) {
      rows[f] = encoder.W[features.index[f]];
      bias[f] = encoder.bias[features.index[f]];
    }
  }
  std::vector<const void*> rows;
  std::vector<float> bias;
};

// L1 and L2: how many latents beat each positive p_f, counted until k do.
class Ranks {
 public:
  Ranks(const Rows& x, const Encoder& encoder, const Features& features, const FeatureRows& rows,
        const int64_t* tokens, float* const* acts, size_t count)
      : x_(x),
        encoder_(encoder),
        features_(features),
        tokens_(tokens),
        acts_(acts),
        count_(count),
        beaten_(new std::atomic<int32_t>[count * features.count]) {
    for (size_t t = 0; t < count_; ++t)
      for (int64_t f = 0; f < features.count; ++f)
        beaten(t, f) = acts[t][f] > 0 ? 0 : static_cast<int32_t>(encoder.k);
    if (Panel::serves(x, encoder.W)) pack(rows);
  }

  // Leaves in acts what is live, and 0 elsewhere.
  void settle() {
    parallel(blocks(encoder_), [this](Pieces& pieces, int64_t) { scan(pieces); });
    for (size_t t = 0; t < count_; ++t)
      for (int64_t f = 0; f < features_.count; ++f)
        if (acts_[t][f] > 0 && decided(t, f)) acts_[t][f] = 0;
  }

 private:
  std::atomic<int32_t>& beaten(size_t t, int64_t f) { return beaten_[t * features_.count + f]; }
  bool decided(size_t t, int64_t f) {
    return beaten(t, f).load(std::memory_order_relaxed) >= encoder_.k;
  }
  bool decided(size_t t) {
    for (int64_t f = 0; f < features_.count; ++f)
      if (!decided(t, f)) return false;
    return true;
  }

  // Latents are to be compared with a p_f that was summed as theirs is, not as L0 does.
  void pack(const FeatureRows& rows) {
    panel_.emplace(x_, tokens_, count_);
    thresholds_.resize(count_ * features_.count);
    float p[Panel::kMost * kBlock];
    for (int64_t f0 = 0; f0 < features_.count; f0 += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(kBlock, features_.count - f0));
      panel_->dots(&rows.rows[f0], n, &rows.bias[f0], p);
      for (size_t t = 0; t < count_; ++t)
        std::copy_n(p + t * kBlock, n, &thresholds_[t * features_.count + f0]);
    }
  }

  float threshold(size_t t, int64_t f) const {
    return panel_ ? thresholds_[t * features_.count + f] : acts_[t][f];
  }

  void scan(Pieces& pieces) {
    std::vector<size_t> open(count_);
    std::iota(open.begin(), open.end(), 0);
    Tokens tile(x_, encoder_.W);
    each_block(encoder_, pieces, [&](const Block& block) {
      open.erase(std::remove_if(open.begin(), open.end(), [this](size_t t) { return decided(t); }),
                 open.end());
      panel_ ? count_packed(block, open) : count_tiled(block, open, tile);
      return !open.empty();
    });
  }

  void count_tiled(const Block& block, const std::vector<size_t>& open, Tokens& tile) {
    for (size_t first = 0; first < open.size(); first += kernels().tokens)
      count_tile(block, open.data() + first,
                 static_cast<int>(std::min<size_t>(kernels().tokens, open.size() - first)), tile,
                 first == 0);
  }

  void count_packed(const Block& block, const std::vector<size_t>& open) {
    if (open.empty()) return;
    float p[Panel::kMost * kBlock];
    panel_->dots(block.rows, block.count, encoder_.bias + block.first, open, p);
    for (const size_t t : open) tally(block, t, p + t * kBlock);
  }

  void count_tile(const Block& block, const size_t* open, int m, Tokens& tile, bool cold) {
    int64_t tokens[Tokens::kCapacity];
    for (int i = 0; i < m; ++i) tokens[i] = tokens_[open[i]];
    // Where W_enc comes from memory, four or five tokens take longer than a full tile.
    const int filled = cold && m > 3 ? kernels().tokens : m;
    std::fill(tokens + m, tokens + filled, tokens[0]);
    tile.load(tokens, filled);
    float p[Tokens::kCapacity * kBlock];
    tile.dots(block.rows, encoder_.W.dtype, block.count, encoder_.bias + block.first, p, cold);
    for (int i = 0; i < m; ++i) tally(block, open[i], p + i * kBlock);
  }

  void tally(const Block& block, size_t t, const float* p) {
    for (int64_t f = 0; f < features_.count; ++f) {
      if (decided(t, f)) continue;
      const uint64_t bits = beaters(block, p, threshold(t, f), features_.index[f]);
      if (bits) beaten(t, f).fetch_add(__builtin_popcountll(bits), std::memory_order_relaxed);
    }
  }

  // The latents of the block that beat feature f, which itself is left out by its index.
  uint64_t beaters(const Block& block, const float* p, float p_f, int64_t f) const {
    const auto beats = kernels().beats;
    if (encoder_.order != nullptr) {
      const uint64_t larger = beats(p, block.count, p_f, false);
      const uint64_t ties = beats(p, block.count, p_f, true) & ~larger;
      return (larger & ~block.bit(f)) | lower(ties, block.first, f);
    }
    if (f >= block.first + block.count) return beats(p, block.count, p_f, true);
    if (f < block.first) return beats(p, block.count, p_f, false);
    const uint64_t self = block.bit(f), below = self - 1;
    return (beats(p, block.count, p_f, true) & below) |
           (beats(p, block.count, p_f, false) & ~(below | self));
  }

  // Of these rows, counted from `first`, those whose latents come before that of row f.
  uint64_t lower(uint64_t rows, int64_t first, int64_t f) const {
    uint64_t found = 0;
    for (; rows; rows &= rows - 1) {
      const int j = __builtin_ctzll(rows);
      found |= uint64_t{encoder_.order[first + j] < encoder_.order[f]} << j;
    }
    return found;
  }

  const Rows x_;
  const Encoder& encoder_;
  const Features& features_;
  const int64_t* tokens_;
  float* const* acts_;
  const size_t count_;
  std::unique_ptr<std::atomic<int32_t>[]> beaten_;
  std::optional<Panel> panel_;
  std::vector<float> thresholds_;
};

// One chunk of tokens at a time: L0 settles most, Ranks the rest.
class Ladder {
 public:
  Ladder(const Rows& x, const Encoder& encoder, const Features& features, const bool* mask,
         const Dead& dead, const Settled& settled, int64_t most, int64_t spare)
      : x_(x),
        encoder_(encoder),
        features_(features),
        mask_(mask),
        dead_(dead),
        settled_(settled),
        spare_(spare),
        rows_(encoder, features),
        acts_(most * features.count),
        open_(most) {}

  void climb(int64_t begin, int64_t end) {
    begin_ = begin;
    std::fill(open_.begin(), open_.end(), 0);
    over_tokens(end - begin, [this](Spans& spans) { project(spans); });

    std::vector<int64_t> tokens;
    std::vector<float*> acts;
    for (int64_t t = begin; t < end; ++t)
      if (open_[t - begin]) tokens.push_back(t), acts.push_back(acts_of(t));
    if (tokens.empty()) return;
    // With k = N no rank is too low.
    if (encoder_.k < encoder_.count) rank(tokens, acts);
    over_tokens(tokens.size(), [&](Spans& spans) {
      for (int64_t from, to; spans.take(from, to);)
        for (; from < to; ++from) settled_(tokens[from], acts[from]);
    });
  }

 private:
  void rank(const std::vector<int64_t>& tokens, const std::vector<float*>& acts) {
    const size_t step = at_once(tokens.size(), most_at_once(x_, encoder_.W, spare_));
    for (size_t t = 0; t < tokens.size(); t += step)
      Ranks(x_, encoder_, features_, rows_, &tokens[t], &acts[t], std::min(step, tokens.size() - t))
          .settle();
  }

  float* acts_of(int64_t token) { return acts_.data() + (token - begin_) * features_.count; }

  // L0 for the tokens begin_ + from ... begin_ + to - 1 of each span.
  void project(Spans& spans) {
    Tokens tile(x_, encoder_.W);
    const bool writing = dead_.sum != nullptr && features_.count <= kFusedRows;
    const int most = writing ? kFusedTokens : kernels().tokens;
    int64_t taken[Tokens::kCapacity];
    for (int64_t from, to; spans.take(from, to);) {
      int m = 0;
      for (int64_t t = begin_ + from; t < begin_ + to; ++t) {
        if (mask_ && !mask_[t])
          settled_(t, nullptr);
        else
          taken[m++] = t;
        if (m == most) writing ? write(taken) : project(tile, taken, m), m = 0;
      }
      const int tokens = kernels().tokens;
      for (int i = 0; i < m; i += tokens) project(tile, taken + i, std::min(tokens, m - i));
    }
  }

  void project(Tokens& tile, const int64_t* tokens, int m) {
    tile.load(tokens, m);
    float p[Tokens::kCapacity * kBlock];
    for (int64_t f0 = 0; f0 < features_.count; f0 += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(kBlock, features_.count - f0));
      tile.dots(rows_.rows.data() + f0, encoder_.W.dtype, n, rows_.bias.data() + f0, p, false);
      for (int i = 0; i < m; ++i) keep(tokens[i], f0, n, p + i * kBlock);
    }
    for (int i = 0; i < m; ++i)
      if (!open_[tokens[i] - begin_]) settled_(tokens[i], acts_of(tokens[i]));
  }

  // L0 for kFusedTokens tokens, written as dead at once. Those that are not are written again.
  void write(const int64_t* tokens) {
    const void* x[kFusedTokens];
    void* y[kFusedTokens];
    for (int i = 0; i < kFusedTokens; ++i) x[i] = x_[tokens[i]], y[i] = dead_.y[tokens[i]];
    const int n = static_cast<int>(features_.count);
    float p[kFusedTokens * kBlock];
    kernels().dots_and_add(x, x_.dtype, rows_.rows.data(), encoder_.W.dtype, n, x_.width,
                           rows_.bias.data(), p, dead_.sum, y);
    for (int i = 0; i < kFusedTokens; ++i) {
      keep(tokens[i], 0, n, p + i * kBlock);
      const float* acts = acts_of(tokens[i]);
      const bool dead = std::all_of(acts, acts + n, [](float a) { return a == 0; });
      if (!dead && !open_[tokens[i] - begin_]) settled_(tokens[i], acts);  // NaN
    }
  }

  // Takes n of a token's p, those of the features from f0 on. A positive one is not settled yet.
  void keep(int64_t token, int64_t f0, int n, const float* p) {
    float* acts = acts_of(token) + f0;
    for (int f = 0; f < n; ++f) {
      acts[f] = !std::isfinite(p[f]) ? NAN : p[f] > 0 ? p[f] : 0;
      if (acts[f] > 0) open_[token - begin_] = 1;
    }
  }

  const Rows x_;
  const Encoder& encoder_;
  const Features& features_;
  const bool* mask_;
  const Dead dead_;
  const Settled& settled_;
  const int64_t spare_;
  const FeatureRows rows_;
  std::vector<float> acts_;
  std::vector<uint8_t> open_;
  int64_t begin_ = 0;
};

}  // namespace

void measure(const Rows& x, int64_t tokens, const Encoder& encoder, const Features& features,
             const bool* mask, const Dead& dead, const Settled& settled) {
  const int64_t most = std::min(tokens, chunk_tokens(encoder, features.count));
  const int64_t kept = most * kept_bytes(encoder, features.count);
  const int64_t spare = (int64_t{15} << 16) + 64 * tokens - kept;  // of 1 MiB and 64 bytes a token
  Ladder ladder(x, encoder, features, mask, dead, settled, most, spare);
  for (int64_t begin = 0; begin < tokens; begin += most)
    ladder.climb(begin, std::min(tokens, begin + most));
}

}  // namespace saesteer::cpu
