// The best of each token, a heap a thread, then merged; and weighted sums of W_dec's rows.
#include "encode.h"

#include <cmath>
#include <functional>
#include <numeric>
#include <optional>

#include "../keys.h"
#include "panel.h"
#include "tokens.h"

namespace saesteer::cpu {
namespace {

// The k largest keys of one token that one thread has seen: a heap, its smallest first.
struct Best {
  uint64_t* keys;
  int64_t count = 0;

  float threshold(int64_t k) const { return count < k ? -INFINITY : preact_of(keys[0]); }

  void offer(uint64_t key, int64_t k) {
    if (count == k) {
      if (key <= keys[0]) return;
      std::pop_heap(keys, keys + count--, std::greater<>());
    }
    keys[count++] = key;
    std::push_heap(keys, keys + count, std::greater<>());
  }
};

// Every thread keeps its own k best of each token; `merge` takes the best of these.
class Selection {
 public:
  Selection(const Rows& x, const Encoder& encoder, int64_t workers, int64_t most)
      : x_(x),
        encoder_(encoder),
        workers_(workers),
        most_(most),
        keys_(workers * most * encoder.k),
        best_(workers * most) {}

  void select(int64_t begin, int64_t end, float* values, int64_t* indices) {
    for (size_t i = 0; i < best_.size(); ++i) best_[i] = {keys_.data() + i * encoder_.k};
    pack(begin, end);
    parallel(blocks(encoder_), [&](Pieces& pieces, int64_t worker) {
      scan(begin, end, pieces, best_.data() + worker * most_);
    });
    parallel(end - begin, [&](Pieces& pieces, int64_t) {
      std::vector<uint64_t> all;
      for (int64_t t; pieces.take(t);)
        merge(t, all, values + (begin + t) * encoder_.k, indices + (begin + t) * encoder_.k);
    });
  }

 private:
  void pack(int64_t begin, int64_t end) {
    if (!Panel::serves(x_, encoder_.W)) return;
    std::vector<int64_t> tokens(end - begin);
    std::iota(tokens.begin(), tokens.end(), begin);
    panel_.emplace(x_, tokens.data(), end - begin);
  }

  void scan(int64_t begin, int64_t end, Pieces& pieces, Best* best) {
    if (panel_) return scan_panel(end - begin, pieces, best);
    Tokens tile(x_, encoder_.W);
    float p[Tokens::kCapacity * kBlock];
    each_block(encoder_, pieces, [&](const Block& block) {
      for (int64_t t = begin; t < end; t += tile.count()) {
        tile.load_from(t, end);
        tile.dots(block.rows, encoder_.W.dtype, block.count, encoder_.bias + block.first, p,
                  t == begin);
        for (int i = 0; i < tile.count(); ++i) offer(block, p + i * kBlock, best[t + i - begin]);
      }
      return true;
    });
  }

  void scan_panel(int64_t count, Pieces& pieces, Best* best) {
    float p[Panel::kMost * kBlock];
    each_block(encoder_, pieces, [&](const Block& block) {
      panel_->dots(block.rows, block.count, encoder_.bias + block.first, p);
      for (int64_t t = 0; t < count; ++t) offer(block, p + t * kBlock, best[t]);
      return true;
    });
  }

  void offer(const Block& block, const float* p, Best& best) {
    const bool full = best.count == encoder_.k;
    uint64_t bits = kernels().beats(p, block.count, best.threshold(encoder_.k), !full);
    for (; bits; bits &= bits - 1) {
      const int j = __builtin_ctzll(bits);
      best.offer(key_of(p[j], block.first + j), encoder_.k);
    }
  }

  void merge(int64_t t, std::vector<uint64_t>& all, float* values, int64_t* indices) {
    all.clear();
    for (int64_t w = 0; w < workers_; ++w) {
      const Best& best = best_[w * most_ + t];
      all.insert(all.end(), best.keys, best.keys + best.count);
    }
    std::partial_sort(all.begin(), all.begin() + encoder_.k, all.end(), std::greater<>());
    for (int64_t i = 0; i < encoder_.k; ++i) {
      const float p = preact_of(all[i]);
      values[i] = p <= 0 ? 0 : p;
      indices[i] = index_of(all[i]);
    }
  }

  const Rows x_;
  const Encoder& encoder_;
  const int64_t workers_, most_;
  std::vector<uint64_t> keys_;
  std::vector<Best> best_;
  std::optional<Panel> panel_;
};

}  // namespace

void encode(const Rows& x, int64_t tokens, const Encoder& encoder, float* values,
            int64_t* indices) {
  if (tokens == 0) return;
  // Kept at once, keys and packed tokens: a megabyte, or a tile's.
  const int64_t workers = workers_for(blocks(encoder)), keys = 8 * encoder.k * workers;
  constexpr int64_t kBytes = int64_t{1} << 20;
  const int64_t most = Panel::serves(x, encoder.W)
                           ? Panel::most(packed_bytes(x.width) + keys, kBytes)
                           : std::max<int64_t>(kBytes / keys, kernels().tokens);
  const int64_t step = std::min(tokens, at_once(tokens, most));
  Selection selection(x, encoder, workers, step);
  for (int64_t begin = 0; begin < tokens; begin += step)
    selection.select(begin, std::min(tokens, begin + step), values, indices);
}

void decode(const float* values, const int64_t* indices, int64_t tokens, int64_t k,
            const Rows& W_dec, const float* b_dec, const OutRows& y) {
  parallel(tokens, [&](Pieces& pieces, int64_t) {
    std::vector<float> coef;
    std::vector<const void*> rows;
    for (int64_t t; pieces.take(t);) {
      coef.clear(), rows.clear();
      for (int64_t i = t * k; i < (t + 1) * k; ++i)
        if (values[i] != 0) coef.push_back(values[i]), rows.push_back(W_dec[indices[i]]);
      kernels().add(b_dec, Dtype::f32, nullptr, rows.data(), W_dec.dtype, coef.data(), coef.size(),
                    W_dec.width, y[t], y.dtype);
    }
  });
}

}  // namespace saesteer::cpu
