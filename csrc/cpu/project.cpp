// The products, a tile of tokens by a block of rows at a time.
#include "project.h"

#include "blocks.h"
#include "spans.h"
#include "tokens.h"

namespace saesteer::cpu {

void project(const Rows& x, int64_t tokens, const Rows& rows, int64_t count, const float* bias,
             float* out) {
  const Encoder encoder{rows, bias, count, count};
  over_tokens(tokens, [&](Spans& spans) {
    Tokens tile(x, rows);
    Block block;
    float p[Tokens::kCapacity * kBlock];
    for (int64_t from, to; spans.take(from, to);)
      for (; from < to; from += tile.count()) {
        tile.load_from(from, to);
        for (int64_t b = 0; b < blocks(encoder); ++b) {
          block.select(encoder, b, b + 1);
          tile.dots(block.rows, rows.dtype, block.count, bias + block.first, p, false);
          for (int i = 0; i < tile.count(); ++i)
            std::copy_n(p + i * kBlock, block.count, out + (from + i) * count + block.first);
        }
      }
  });
}

}  // namespace saesteer::cpu
