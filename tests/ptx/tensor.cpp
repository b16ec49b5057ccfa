// Products of matrices, by warps and by warpgroups, and copies of boxes of a tensor.
#include <cmath>
#include <utility>

#include "machine.h"
#include "numbers.h"
#include "tensor_map.h"

namespace ptx {

namespace {

// ---- ldmatrix, stmatrix: 8 x 8 matrices of 16 bits, whose rows lanes 8 m to 8 m + 7 point at ----

int matrices(const Instruction& i) { return i.has("x4") ? 4 : i.has("x2") ? 2 : 1; }

// Thread t of a matrix holds columns 2 (t % 4) and one more of row t / 4; transposed, rows.
template <class F>
void each_element(bool transposed, const F& f) {
  for (int l = 0; l < kWarp; ++l)
    for (int half = 0; half < 2; ++half) {
      const int slow = l / 4, fast = l % 4 * 2 + half;
      f(l, half, transposed ? fast : slow, transposed ? slow : fast);
    }
}

Outcome load_matrices(Warp& w, const Instruction& i, uint32_t) {
  for (int m = 0; m < matrices(i); ++m) {
    const unsigned char* rows[8];
    for (int r = 0; r < 8; ++r) rows[r] = w.access(i, 1, 8 * m + r, 16, false);
    std::array<std::array<uint16_t, 2>, kWarp> found;
    each_element(i.has("trans"), [&](int l, int half, int row, int column) {
      memcpy(&found[l][half], rows[row] + 2 * column, 2);
    });
    for (int l = 0; l < kWarp; ++l)
      w.put<uint32_t>(i.operands[0].list[m], l, found[l][0] | uint32_t{found[l][1]} << 16);
  }
  return Outcome::done;
}

Outcome store_matrices(Warp& w, const Instruction& i, uint32_t) {
  for (int m = 0; m < matrices(i); ++m) {
    unsigned char* rows[8];
    for (int r = 0; r < 8; ++r) rows[r] = w.access(i, 0, 8 * m + r, 16, true);
    each_element(i.has("trans"), [&](int l, int half, int row, int column) {
      const uint32_t pair = w.get<uint32_t>(i.operands[1].list[m], l);
      const auto v = static_cast<uint16_t>(pair >> 16 * half);
      memcpy(rows[row] + 2 * column, &v, 2);
    });
  }
  return Outcome::done;
}

// ---- mma.sync m16n8k16: c = a b + c in fp32 ----

template <class T>
float half_of(uint32_t pair, int which) {
  T v;
  v.bits = static_cast<uint16_t>(pair >> 16 * which);
  return v;
}

// Thread t: group g = t / 4, place q = t % 4. a's registers: rows g, g + 8, g, g + 8, columns 2 q,
// 2 q, 2 q + 8, 2 q + 8 and one more each; b's: rows 2 q and 2 q + 8, column g; c's: rows g, g,
// g + 8, g + 8, columns 2 q, 2 q + 1.
template <class T>
Outcome multiply(Warp& w, const Instruction& i, uint32_t) {
  const auto& o = i.operands;
  float a[16][16], b[16][8];
  for (int l = 0; l < kWarp; ++l) {
    const int g = l / 4, q = l % 4;
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < 4; ++r)
        a[g + r % 2 * 8][2 * q + r / 2 * 8 + half] =
            half_of<T>(w.get<uint32_t>(o[1].list[r], l), half);
      for (int r = 0; r < 2; ++r)
        b[2 * q + r * 8 + half][g] = half_of<T>(w.get<uint32_t>(o[2].list[r], l), half);
    }
  }
  double sums[16][8] = {};
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column)
        sums[row][column] += static_cast<double>(a[row][k]) * b[k][column];
  for (int l = 0; l < kWarp; ++l)
    for (int r = 0; r < 4; ++r) {
      const double c = w.get<float>(o[3].list[r], l);
      const double sum = sums[l / 4 + r / 2 * 8][l % 4 * 2 + r % 2];
      w.put(o[0].list[r], l, canonical(static_cast<float>(c + sum)));
    }
  return Outcome::done;
}

// ---- wgmma ----

// A matrix in shared memory, 16 columns of it, whose rows are contiguous: groups of 8 rows lie
// `group` bytes apart, rows the swizzle's width.
struct Matrix {
  uint64_t start, leading, group;
  int swizzle;

  explicit Matrix(uint64_t description)
      : start((description & 0x3FFF) << 4),
        leading((description >> 16 & 0x3FFF) << 4),
        group((description >> 32 & 0x3FFF) << 4) {
    constexpr int kWidths[] = {0, 128, 64, 32};
    swizzle = kWidths[description >> 62];
    if (description >> 49 & 7) throw std::runtime_error("a matrix with an offset of its pattern");
  }

  // Of 16 bytes: 8 columns
  uint64_t address(int row, int eighth) const {
    if (!swizzle) return start + row / 8 * group + row % 8 * 16 + eighth * leading;
    return swizzled(
        start + row / 8 * group + static_cast<uint64_t>(row % 8 * swizzle + eighth * 16), swizzle);
  }
};

template <class T>
void gather(Warp& w, const Instruction& i, const Agent& agent, const Matrix& from, int first,
            int rows, float* to) {
  for (int row = 0; row < rows; ++row)
    for (int eighth = 0; eighth < 2; ++eighth) {
      const unsigned char* at = w.shared(from.address(first + row, eighth), 16);
      w.block.grid.races.require_written(at, 16);
      w.block.grid.races.touch(
          at, 16, {agent, false, false, !w.block.grid.is_tritons, -1, w.step, w.syncs, i.line});
      for (int c = 0; c < 8; ++c) {
        T v;
        memcpy(&v.bits, at + 2 * c, 2);
        to[row * 16 + eighth * 8 + c] = v;
      }
    }
}

void take(Warp& w, std::vector<Product>& products) {
  for (const Product& p : products) {
    p.work();
    for (const int reg : p.registers) w.locked[reg] = 0;
  }
  products.clear();
}

// Row r of the warp's 16 in registers 2 (r / 8) and one more of every four, as for mma.sync.
template <class T>
Outcome multiply_group(Warp& w, const Instruction& i, uint32_t) {
  const auto& o = i.operands;
  const std::vector<int>& c = o[0].list;
  if (!o[1].list.empty()) throw std::runtime_error("a of wgmma from registers");
  for (size_t k = 4; k < o.size(); ++k)
    if (w.uniform(o[k].reg) != (k < 6)) throw std::runtime_error("wgmma negates or transposes");
  if (!w.multiplying) w.multiplying = std::make_shared<Flight>(w.block.grid.races, w.agent);
  const auto flight = w.multiplying;
  flight->agent.take(w.agent);
  const Matrix left(w.uniform(o[1].reg)), right(w.uniform(o[2].reg));
  const bool adds = w.holds(o[3], 0);
  for (const int reg : c) {
    if (w.used[reg] > w.fenced && !w.block.grid.is_tritons)
      throw std::runtime_error("a sum's register, used since the last wgmma.fence");
    w.locked[reg] = 1;
  }
  const auto work = [&w, &i, flight, left, right, adds, c] {
    const int width = static_cast<int>(c.size()) * 2;
    std::vector<float> a(16 * 16), b(width * 16);
    gather<T>(w, i, flight->agent, left, w.index % 4 * 16, 16, a.data());
    gather<T>(w, i, flight->agent, right, 0, width, b.data());
    for (int l = 0; l < kWarp; ++l)
      for (size_t r = 0; r < c.size(); ++r) {
        const int row = l / 4 + r / 2 % 2 * 8, column = r / 4 * 8 + l % 4 * 2 + r % 2;
        double sum = adds ? w.get<float>(c[r], l) : 0;
        for (int k = 0; k < 16; ++k)
          sum += static_cast<double>(a[row * 16 + k]) * b[column * 16 + k];
        w.put(c[r], l, canonical(static_cast<float>(sum)));
      }
  };
  w.products.push_back({work, c});
  if (w.block.grid.coin()) return Outcome::done;
  // Early: what was begun before comes first
  for (ProductGroup& group : w.product_groups)
    for (Product& p : group.products) std::exchange(p.work, [] {})();
  for (Product& p : w.products) std::exchange(p.work, [] {})();
  return Outcome::done;
}

Outcome products(Warp& w, const Instruction& i, uint32_t) {
  if (i.has("fence")) w.fenced = w.step;
  if (i.has("commit_group")) {
    w.product_groups.push_back({std::exchange(w.multiplying, nullptr), std::move(w.products)});
    w.products.clear();
  }
  if (i.has("wait_group"))
    for (auto& groups = w.product_groups; groups.size() > w.uniform(i.operands[0].reg);
         groups.pop_front()) {
      take(w, groups.front().products);
      if (const auto& flight = groups.front().flight) w.agent.take(flight->agent);
    }
  return Outcome::done;
}

// ---- cp.async.bulk.tensor: a box, whose elements outside of the tensor are zero ----

void land(Warp& w, const Instruction& i, const Flight& flight, const TensorMap& map,
          std::array<int, 5> corner, uint64_t to) {
  const int inner = map.box[0] * map.element_bytes;
  Races& races = w.block.grid.races;
  Traffic& traffic = *w.block.grid.traffic;
  int64_t rows = 1;
  for (int d = 1; d < map.rank; ++d) rows *= map.box[d];
  for (int64_t row = 0; row < rows; ++row) {
    auto from = map.base;
    bool inside = true;
    int64_t rest = row;
    for (int d = 1; d < map.rank; ++d, rest /= map.box[d - 1]) {
      const int64_t at = corner[d] + rest % map.box[d];
      inside &= at >= 0 && at < map.sizes[d];
      from += at * map.strides[d - 1];
    }
    for (int c = 0; c < map.box[0]; ++c) {
      const int64_t column = corner[0] + c;
      const auto* source =
          reinterpret_cast<const unsigned char*>(from + column * map.element_bytes);
      unsigned char* target = w.shared(
          swizzled(to + row * inner + c * map.element_bytes, map.swizzle), map.element_bytes);
      const bool there = inside && column >= 0 && column < map.sizes[0];
      const auto access = [&](bool write) {
        return Access{flight.agent, write, false, true, -1, w.step, w.syncs, i.line};
      };
      races.touch(target, map.element_bytes, access(true));
      if (!there) {
        memset(target, 0, map.element_bytes);
        continue;
      }
      races.touch(source, map.element_bytes, access(false));
      traffic.lane(Traffic::read, source, map.element_bytes);
      memcpy(target, source, map.element_bytes);
    }
  }
  traffic.end(w.block.grid.kernel.name, i.line);
}

Outcome copy_box(Warp& w, const Instruction& i, uint32_t lanes) {
  const auto& o = i.operands;  // [to], [map, {corner}], [barrier]
  each(lanes, [&](int l) {
    TensorMap map;
    memcpy(&map, reinterpret_cast<const void*>(w.get<uint64_t>(o[1].reg, l)), sizeof map);
    if (map.magic != TensorMap::kMagic || map.rank != o[1].list.size())
      throw std::runtime_error("no tensor map, or one of another rank");
    const uint64_t to = w.get<uint32_t>(o[0].reg, l) + o[0].offset;
    if (to % (map.swizzle ? map.swizzle * 8 : 128))
      throw std::runtime_error("a box at a misaligned address");
    std::array<int, 5> corner{};
    for (int d = 0; d < map.rank; ++d)
      corner[d] = static_cast<int>(w.get<uint32_t>(o[1].list[d], l));
    const uint64_t barrier = w.get<uint32_t>(o[2].reg, l) + o[2].offset;
    const auto flight = std::make_shared<Flight>(w.block.grid.races, w.agent);
    w.block.events.push_back([&w, &i, flight, map, corner, to, barrier] {
      land(w, i, *flight, map, corner, to);
      int64_t bytes = map.element_bytes;
      for (int d = 0; d < map.rank; ++d) bytes *= map.box[d];
      PhaseBarrier& b = w.block.phase_barrier(barrier);
      b.gathered.gather(flight->agent);
      b.bytes -= bytes;
      b.settle();
    });
  });
  return Outcome::done;
}

}  // namespace

Handler tensor(Instruction& i) {
  const std::string& op = i.words[0];
  if (op == "cp")
    return i.has("tensor") && i.has("mbarrier::complete_tx::bytes") ? copy_box : nullptr;
  i.aligned = true;
  if (op == "ldmatrix" || op == "stmatrix") {
    if (!i.has("m8n8") || !i.has("b16")) return nullptr;
    i.space = i.has("shared") || i.has("shared::cta") ? Space::shared : Space::generic;
    return op == "ldmatrix" ? load_matrices : store_matrices;
  }
  if (op == "mma") {
    if (!i.has("m16n8k16") || i.words.back() != "f32") return nullptr;
    return i.has("bf16") ? multiply<BF16> : i.has("f16") ? multiply<F16> : nullptr;
  }
  if (!i.has("mma_async")) return products;
  if (!i.has("f32") || i.words.size() != 8) return nullptr;
  return i.words.back() == "bf16"  ? multiply_group<BF16>
         : i.words.back() == "f16" ? multiply_group<F16>
                                   : nullptr;
}

}  // namespace ptx
