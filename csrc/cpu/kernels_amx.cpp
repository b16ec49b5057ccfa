// Products of many tokens with W_enc by AMX, 16 latents by 16 tokens by 32 columns an instruction;
// all else is as with AVX-512 BF16.
//
// Tiles 0 to 3 hold the sums of 32 latents by up to 32 tokens, 4 and 5 rows of W_enc, 6 and 7 the
// tokens. An element of a tile is summed in one order, whatever else the tile holds.
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace saesteer::cpu {
namespace {

constexpr int kSide = 16;      // rows of a tile, and its words a row
constexpr int kRowBytes = 64;  // of a tile
constexpr int kDepth = 32;     // columns of W_enc in a tile
constexpr int kLatents = 32;   // rows of W_enc at once
// Columns of them, whose copy stays in the second-level cache with the tokens.
constexpr int kColumns = 1024;
constexpr int kSums = kSide * kSide;
static_assert(kGroupTokens == 2 * kSide && kBlock % kLatents == 0);

using Words = __m512i[kSide];

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

int first_tile(int tokens) { return static_cast<int>(least(tokens, kSide)); }

// Rows become columns.
void transpose(Words& r) {
  Words s;
  for (int i = 0; i < kSide; i += 2) {
    s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < kSide; i += 4)
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(s[i + j], s[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(s[i + j], s[i + j + 2]);
    }
  for (int i = 0; i < kSide; i += 8)
    for (int j = 0; j < 4; ++j) {
      s[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
      s[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xDD);
    }
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_i32x4(s[j], s[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_i32x4(s[j], s[j + 8], 0xDD);
  }
}

__mmask16 first(int64_t words) {
  return static_cast<__mmask16>(words < kSide ? (1 << words) - 1 : 0xFFFF);
}

// The first 32 columns of a row of which `left` are there, and zeros.
__m512i load(const bf16* row, int64_t left) {
  if (left >= kDepth) return _mm512_loadu_si512(row);
  return _mm512_maskz_loadu_epi16((__mmask32{1} << left) - 1, row);
}

// Tiles of tokens: word t of row c / 2 holds columns c and c + 1 of token t.
void pack_tile(const void* const* x, int m, int64_t d, char* packed) {
  for (int64_t c = 0; c < d; c += kDepth) {
    Words r;
    for (int t = 0; t < kSide; ++t)
      r[t] = t < m ? load(static_cast<const bf16*>(x[t]) + c, d - c) : _mm512_setzero_si512();
    transpose(r);
    for (int i = 0; i < kSide; ++i, packed += 4 * m)
      _mm512_mask_storeu_epi32(packed, first(m), r[i]);
  }
}

void pack(const void* const* x, int m, int64_t d, void* packed) {
  const int m0 = first_tile(m);
  char* const to = static_cast<char*>(packed);
  pack_tile(x, m0, d, to);
  if (m > m0) pack_tile(x + m0, m - m0, d, to + m0 * packed_bytes(d));
}

// GCC does not know that tiles and their shapes are loaded from memory, and might store there
// later.
void store_now() { __asm__ volatile("" ::: "memory"); }

// The tiles' shapes, for groups of so many tokens.
void shape_tiles(int tokens) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } shapes;
  const int m0 = first_tile(tokens), m1 = tokens > m0 ? tokens - m0 : 1;
  for (int i = 0; i < 8; ++i) shapes.rows[i] = kSide, shapes.row_bytes[i] = kRowBytes;
  shapes.row_bytes[0] = shapes.row_bytes[2] = shapes.row_bytes[6] = 4 * m0;
  shapes.row_bytes[1] = shapes.row_bytes[3] = shapes.row_bytes[7] = 4 * m1;
  store_now();
  _tile_loadconfig(&shapes);
}

// Where kLatents rows of W_enc lie: tiles of kSide rows, side by side and one below the other.
struct Tiling {
  const char* first;
  int64_t row_bytes, next_column, next_row;

  const char* at(int64_t column, int row) const {
    return first + column * next_column + row * next_row;
  }
};

// A group's tokens, in one tile or two.
struct Packed {
  Packed(const Group& group, int64_t d) {
    count[0] = first_tile(group.tokens), count[1] = group.tokens - count[0];
    first[0] = static_cast<const char*>(group.packed);
    first[1] = first[0] + count[0] * packed_bytes(d);
  }
  const char* at(int64_t column, int tile) const {
    return first[tile] + column * kSide * 4 * count[tile];
  }
  const char* first[2];
  int count[2];
};

// Of the rows of W_enc that come next, those that are fetched meanwhile.
struct Ahead {
  const char* rows;
  int64_t row_bytes;
  int begin, end;

  void fetch(int64_t column) const {
    for (int j = begin; j < end; ++j)
      _mm_prefetch(rows + j * row_bytes + column * kRowBytes, _MM_HINT_T1);
  }
};

void fetch(const char* tile) {
  for (int i = 0; i < kSide; ++i) _mm_prefetch(tile + i * kRowBytes, _MM_HINT_T0);
}

// Adds the products of `count` tiles of W_enc with a group's, from tile `from` on, to its sums; and
// copies those tiles.
template <bool kTwo, bool kCopying>
void multiply(const Tiling& w, const Packed& x, int64_t from, int64_t count, const Ahead& next,
              char* copy, float* sums) {
  store_now();
  _tile_loadd(0, sums, kRowBytes);
  _tile_loadd(2, sums + 2 * kSums, kRowBytes);
  if (kTwo) _tile_loadd(1, sums + kSums, kRowBytes);
  if (kTwo) _tile_loadd(3, sums + 3 * kSums, kRowBytes);
  for (int64_t i = 0; i < count; ++i) {
    _tile_loadd(6, x.at(from + i, 0), 4 * x.count[0]);
    _tile_loadd(4, w.at(i, 0), w.row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (kTwo) _tile_loadd(7, x.at(from + i, 1), 4 * x.count[1]);
    if (kTwo) _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, w.at(i, 1), w.row_bytes);
    fetch(x.at(from + i + 1, 0));
    if (kTwo) fetch(x.at(from + i + 1, 1));
    next.fetch(from + i);
    _tile_dpbf16ps(2, 5, 6);
    if (kTwo) _tile_dpbf16ps(3, 5, 7);
    if (kCopying) _tile_stored(4, copy + i * kLatents * kRowBytes, kRowBytes);
    if (kCopying) _tile_stored(5, copy + (i * kLatents + kSide) * kRowBytes, kRowBytes);
  }
  _tile_stored(0, sums, kRowBytes);
  _tile_stored(2, sums + 2 * kSums, kRowBytes);
  if (kTwo) _tile_stored(1, sums + kSums, kRowBytes);
  if (kTwo) _tile_stored(3, sums + 3 * kSums, kRowBytes);
}

// out[i * kBlock + j] = sum of token i and latent j, with its bias; n <= kLatents.
void store_p(const float* sums, int tokens, int n, const float* bias, float* out) {
  for (int i0 = 0; i0 < tokens; i0 += kSide)
    for (int j0 = 0; j0 < n; j0 += kSide) {
      const float* const tile = sums + (j0 / kSide * 2 + i0 / kSide) * kSums;
      Words r;
      for (int j = 0; j < kSide; ++j) r[j] = _mm512_load_si512(tile + j * kSide);
      transpose(r);
      const __mmask16 there = first(n - j0);
      const __m512 b = _mm512_maskz_loadu_ps(there, bias + j0);
      for (int i = i0; i < least(tokens, i0 + kSide); ++i)
        _mm512_mask_storeu_ps(out + i * kBlock + j0, there,
                              _mm512_add_ps(_mm512_castsi512_ps(r[i - i0]), b));
    }
}

// kLatents rows of W_enc at a time, taken past all groups.
class Product {
 public:
  Product(const Group* groups, int count, int64_t d)
      : groups_(groups), count_(count), d_(d), columns_(alike(d, kColumns, kDepth)) {}

  // n <= kLatents rows, and as many that come next.
  void take(const void* const* w, int n) {
    std::memset(sums_, 0, count_ * sizeof sums_[0]);
    if (d_ % kDepth == 0 && adjoin(w))
      take_stored(w);
    else
      for (int64_t c = 0; c < d_; c += columns_) {
        copy(w, n, c);
        take_copy(0, c, nullptr);
      }
  }

  void emit(int n, const float* bias, int64_t first) const {
    for (int g = 0; g < count_; ++g)
      store_p(sums_[g], groups_[g].tokens, n, bias + first, groups_[g].out + first);
  }

 private:
  // Whether all kLatents rows are there, one after the other; and more.
  bool adjoin(const void* const* w) const {
    if (w[kLatents] == nullptr) return false;
    for (int j = 1; j < kLatents; ++j)
      if (w[j] != static_cast<const bf16*>(w[j - 1]) + d_) return false;
    return true;
  }

  void take_stored(const void* const* w) {
    const auto* const here = static_cast<const char*>(w[0]);
    const auto* const next = static_cast<const char*>(w[kLatents]);
    const int64_t columns = count_ == 1 ? d_ : columns_;
    char* const copied = count_ == 1 ? nullptr : copied_;
    for (int64_t c = 0; c < d_; c += columns) {
      // So that column c of it is what comes next.
      const char* const ahead = c + columns < d_ ? here + 2 * columns : next - 2 * c;
      take(0, {here + 2 * c, 2 * d_, kRowBytes, kSide * 2 * d_}, c, columns, ahead, copied);
      take_copy(1, c, ahead);
    }
  }

  // The groups from `first` on, with columns c on of the copy.
  void take_copy(int first, int64_t c, const char* next) {
    const Tiling copied{copied_, kRowBytes, kLatents * kRowBytes, kSide * kRowBytes};
    for (int g = first; g < count_; ++g) take(g, copied, c, columns_, next, nullptr);
  }

  // Group g, with so many columns of W_enc from c on. Every group fetches its share of what comes
  // next, so that memory is read while the others multiply.
  void take(int g, const Tiling& w, int64_t c, int64_t columns, const char* next, char* copy) {
    const Packed x = group(g);
    const int share = next == nullptr ? 0 : kLatents;
    const Ahead ahead{next, 2 * d_, g * share / count_, (g + 1) * share / count_};
    const auto kind = x.count[1] ? (copy ? multiply<true, true> : multiply<true, false>)
                                 : (copy ? multiply<false, true> : multiply<false, false>);
    kind(w, x, c / kDepth, parts(least(columns, d_ - c), kDepth), ahead, copy, sums_[g]);
  }

  // Columns c on of n rows. Rows that miss are zeros: from c = 0 on they stay.
  void copy(const void* const* w, int n, int64_t c) {
    const int64_t tiles = parts(least(columns_, d_ - c), kDepth);
    for (int j = 0; j < kLatents; ++j)
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t at = c + i * kDepth;
        char* const to = copied_ + (i * kLatents + j) * kRowBytes;
        if (j < n)
          _mm512_store_si512(to, load(static_cast<const bf16*>(w[j]) + at, d_ - at));
        else if (c == 0)
          _mm512_store_si512(to, _mm512_setzero_si512());
      }
  }

  Packed group(int g) {
    if (shaped_ != groups_[g].tokens) shape_tiles(shaped_ = groups_[g].tokens);
    return Packed(groups_[g], d_);
  }

  const Group* const groups_;
  const int count_;
  const int64_t d_, columns_;
  int shaped_ = 0;
  alignas(64) char copied_[kLatents * kColumns * 2];
  alignas(64) float sums_[kMostGroups][4 * kSums];
};

void dots(const Group* groups, int count, const void* const* w, int n, int64_t d,
          const float* bias) {
  static_assert(kRowsAhead == kLatents);
  Product product(groups, count, d);
  for (int j = 0; j < n; j += kLatents) {
    const int rows = static_cast<int>(least(kLatents, n - j));
    product.take(w + j, rows);
    product.emit(rows, bias, j);
  }
  _tile_release();
}

}  // namespace

const Tiles amx_tiles{pack, dots};

}  // namespace saesteer::cpu
