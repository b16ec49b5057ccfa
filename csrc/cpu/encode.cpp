// Top-k encode, some tokens at a time; and weighted sums of W_dec's rows.
#include "encode.h"

#include <numeric>
#include <optional>

#include "largest.h"
#include "panel.h"
#include "tokens.h"

namespace saesteer::cpu {
namespace {

// The k largest of at most `most` tokens at a time.
class Selection {
 public:
  Selection(const Rows& x, const Encoder& encoder, int64_t workers, int64_t most)
      : x_(x), encoder_(encoder), largest_(encoder.k, workers, most) {}

  void select(int64_t begin, int64_t end, float* values, int64_t* indices) {
    largest_.clear();
    pack(begin, end);
    parallel(blocks(encoder_),
             [&](Pieces& pieces, int64_t worker) { scan(begin, end, pieces, worker); });
    parallel(end - begin, [&](Pieces& pieces, int64_t) {
      std::vector<uint64_t> keys;
      for (int64_t t; pieces.take(t);) {
        largest_.take(t, keys);
        write(keys, values + (begin + t) * encoder_.k, indices + (begin + t) * encoder_.k);
      }
    });
  }

 private:
  void pack(int64_t begin, int64_t end) {
    if (!Panel::serves(x_, encoder_.W)) return;
    std::vector<int64_t> tokens(end - begin);
    std::iota(tokens.begin(), tokens.end(), begin);
    panel_.emplace(x_, tokens.data(), end - begin);
  }

  void scan(int64_t begin, int64_t end, Pieces& pieces, int64_t worker) {
    if (panel_) return scan_panel(end - begin, pieces, worker);
    Tokens tile(x_, encoder_.W);
    float p[Tokens::kCapacity * kBlock];
    each_block(encoder_, pieces, [&](const Block& block) {
      for (int64_t t = begin; t < end; t += tile.count()) {
        tile.load_from(t, end);
        tile.dots(block.rows, encoder_.W.dtype, block.count, encoder_.bias + block.first, p,
                  t == begin);
        for (int i = 0; i < tile.count(); ++i) offer(block, p + i * kBlock, t + i - begin, worker);
      }
      return true;
    });
  }

  void scan_panel(int64_t count, Pieces& pieces, int64_t worker) {
    float p[Panel::kMost * kBlock];
    each_block(encoder_, pieces, [&](const Block& block) {
      panel_->dots(block.rows, block.count, encoder_.bias + block.first, p);
      for (int64_t t = 0; t < count; ++t) offer(block, p + t * kBlock, t, worker);
      return true;
    });
  }

  void offer(const Block& block, const float* p, int64_t t, int64_t worker) {
    largest_.offer(t, worker, p, block.count, block.first);
  }

  static void write(const std::vector<uint64_t>& keys, float* values, int64_t* indices) {
    for (const uint64_t key : keys) {
      const float p = preact_of(key);
      *values++ = p <= 0 ? 0 : p;
      *indices++ = index_of(key);
    }
  }

  const Rows x_;
  const Encoder& encoder_;
  Largest largest_;
  std::optional<Panel> panel_;
};

}  // namespace

void encode(const Rows& x, int64_t tokens, const Encoder& encoder, float* values,
            int64_t* indices) {
  if (tokens == 0) return;
  // A thread has at once, of keys and packed tokens: a megabyte, or a tile's.
  const int64_t workers = workers_for(blocks(encoder)), keys = Largest::bytes(encoder.k, workers);
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
