// The scan on Hopper's tensor cores, by warpgroups: what scan_mma.cu takes, for many tokens.
//
// One warpgroup, the producer, fills a ring of stages in shared memory, each a panel of 64 columns:
// W by tensor copies, x row by row, since open tokens lie anywhere. Two others, the consumers,
// multiply 64 tokens and all latents of a tile each. Each stage has two barriers: by `full` the
// producer hands it over, by `empty` the consumers give it back.
#include <algorithm>

#include "scan.h"

namespace saesteer::cuda {
namespace {

// A tile has kWide latents, the most that one product takes; where tiles are few, kNarrow, which
// share the multiprocessors better.
constexpr int kTokens = 128, kWide = 256, kNarrow = 192, kStages = 4;
constexpr int kRowBytes = 128;  // of a panel: 64 columns, the widest swizzle
constexpr int kGroup = 128;     // threads of a warpgroup
constexpr int kThreads = 3 * kGroup;
constexpr int kXBytes = kTokens * kRowBytes, kStageBytes = kXBytes + kWide * kRowBytes;
// Stages whose copies of x are under way before the first of them is handed over.
constexpr int kPendingStages = 2;
static_assert(kPendingStages <= kStages - 2,
              "a stage is given back one stage later than it is multiplied");

// A launch gives every thread as many registers, in eights; the warpgroups then share them anew,
// and who asks for more than was given back waits for ever. A consumer's thread has kWide / 2 sums.
constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
constexpr int kProducerRegisters = 104, kConsumerRegisters = 200;
static_assert(kGroup * (kProducerRegisters + 2 * kConsumerRegisters) <=
              kThreads * kLaunchRegisters);

// What a tile's end needs to know, so that it has to wait for nothing.
struct Ends {
  alignas(8) float bias[kWide];
  int32_t token[kTokens];
  int64_t first_latent;
};
struct Ring {
  uint64_t full[kStages];   // a phase: an arrival of each thread of the producer, and W's bytes
  uint64_t empty[kStages];  // a phase: an arrival of each warp of the consumers
  int begins[kStages];      // set in a tile's first stage; 0 after the last tile
  Ends ends[kStages];       // set in a tile's last stage
};
constexpr int64_t kShared = kStages * kStageBytes + sizeof(Ring);
static_assert(kShared <= 227 << 10 && kShared + kStageBytes > 227 << 10,
              "as many stages as a block of Hopper may have");

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A place in the ring, and the parity of its phase.
struct Place {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

struct Tile {
  int64_t number, first_slot, first_latent;  // number -1: none
};

template <int kLatents>
struct Producer {
  const Scan& s;
  const TensorMap* W;
  Ring& ring;
  unsigned char* stages;
  int64_t slots, depth;
  int thread;
  Place at;         // the stage to fill next
  Place handed;     // the stage to hand over next
  int pending = 0;  // filled, not handed over

  // The oldest pending stage, once this thread's copies to it have come.
  __device__ __forceinline__ void hand_over() {
    publish_writes();  // wgmma reads past what orders ordinary writes
    barrier_arrive(&ring.full[handed.stage]);
    handed.next();
    --pending;
  }

  // The first tile from this one on that has an open token.
  __device__ __forceinline__ Tile find_open(int64_t number) const {
    static_assert(kTokens == kGroup, "a thread looks at a token");
    const Tiles<kTokens, kLatents> tiles(slots, s.encoder.count);
    for (; number < tiles.count(); number += gridDim.x) {
      Tile tile{number};
      tiles.locate(number, tile.first_slot, tile.first_latent);
      // Barrier 1 has the producer's threads alone: the consumers go on multiplying.
      if (sync_some_or(1, kGroup, is_open(s, token_of(s, tile.first_slot + thread, slots))))
        return tile;
    }
    return {-1};
  }

  __device__ __forceinline__ void describe_end(const Tile& tile, Ends& ends) const {
    const int latents = latents_from(s, tile.first_latent);
    for (int i = thread; i < kLatents; i += kGroup)
      ends.bias[i] = bias_of(s, tile.first_latent, i, latents);
    ends.token[thread] = static_cast<int32_t>(token_of(s, tile.first_slot + thread, slots));
    if (thread == 0) ends.first_latent = tile.first_latent;
  }

  // Fills a stage for each panel of a tile, and returns the next tile.
  __device__ __forceinline__ Tile fill(const Tile& tile) {
    // A row of a panel is 8 chunks of 16 bytes; a thread copies the same one of every 16th row.
    constexpr int kEach = kTokens * 8 / kGroup;
    const int64_t row_bytes = s.x.width * 2;
    const int chunk = thread % 8;
    int32_t token[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      token[i] = static_cast<int32_t>(token_of(s, tile.first_slot + thread / 8 + i * 16, slots));
    Tile next;
    for (int64_t k = 0; k < depth; ++k) {
      // Before a slot is waited for: consumers with nothing to multiply would free none.
      if (pending == kPendingStages) {
        wait_copies<kPendingStages - 1>();
        hand_over();
      }
      // Midway, while full stages are left to multiply: it waits for the tokens' counts.
      if (k == depth / 2) next = find_open(tile.number + gridDim.x);
      // Free at once in the first round: of a new barrier the phase before counts as ended.
      barrier_wait(&ring.empty[at.stage], at.parity ^ 1);
      unsigned char* const x = stages + at.stage * kStageBytes;
      // W: one thread asks for all rows, and `full` for their bytes.
      if (thread == 0) {
        if (k == 0) ring.begins[at.stage] = true;
        barrier_expect(&ring.full[at.stage], kLatents * kRowBytes);
        copy_box(x + kXBytes, W, &ring.full[at.stage], static_cast<int>(k * kRowBytes / 2),
                 static_cast<int>(tile.first_latent));
      }
      // x: swizzled as tensor copies swizzle; zeros where there is no token or no column.
      const int64_t column = k * kRowBytes + chunk * 16;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int row = thread / 8 + i * 16;
        const bool there = token[i] >= 0 && column < row_bytes;
        copy_async(x + row * kRowBytes + ((chunk ^ (row % 8)) << 4),
                   static_cast<const char*>(s.x.data) + (there ? token[i] * row_bytes + column : 0),
                   there);
      }
      commit_copies();
      if (k == depth - 1) describe_end(tile, ring.ends[at.stage]);
      at.next();
      ++pending;
    }
    return next;
  }

  __device__ __forceinline__ void run() {
    for (Tile tile = find_open(blockIdx.x); tile.number >= 0;) tile = fill(tile);
    wait_copies<0>();
    while (pending) hand_over();
    // One stage more, which begins no tile, ends the consumers' loop.
    barrier_wait(&ring.empty[at.stage], at.parity ^ 1);
    if (thread == 0) ring.begins[at.stage] = false;
    barrier_arrive(&ring.full[at.stage]);
  }
};

template <bool kBf16, int kLatents>
struct Consumer {
  static constexpr int kSums = kLatents / 2;
  const Scan& s;
  Ring& ring;
  const unsigned char* stages;
  int64_t depth;
  int group, thread;
  Place at;

  // Gives a stage back: one arrival a warp, after its lanes have read the stage.
  __device__ __forceinline__ void free(int stage) {
    sync_warp();
    if (thread % 32 == 0) barrier_arrive(&ring.empty[stage]);
  }

  __device__ __forceinline__ void run() {
    for (;;) {
      barrier_wait(&ring.full[at.stage], at.parity);
      if (!ring.begins[at.stage]) return;  // after the last tile
      float sum[kSums];
      end_tile(multiply(sum), sum);
    }
  }

  // Sums a tile's products. Returns its last stage, whose products are still under way.
  __device__ __forceinline__ int multiply(float (&sum)[kSums]) {
    int last = -1;
    for (int64_t k = 0; k < depth; ++k) {
      barrier_wait(&ring.full[at.stage], at.parity);
      const unsigned char* const x = stages + at.stage * kStageBytes;
      const uint64_t a = describe(x + group * 64 * kRowBytes), b = describe(x + kXBytes);
      // A product takes 16 columns, 32 bytes; a tile's first one overwrites the sums.
      products_begin();
#pragma unroll
      for (int i = 0; i < kRowBytes / 32; ++i)
        multiply_group<kBf16>(sum, along(a, i * 32), along(b, i * 32), k > 0 || i > 0);
      products_commit();
      // With these under way, the stage before is waited for and given back.
      if (last >= 0) {
        products_wait<1>();
        free(last);
      }
      last = at.stage;
      at.next();
    }
    return last;
  }

  __device__ __forceinline__ void end_tile(int last, float (&sum)[kSums]) {
    const Ends& ends = ring.ends[last];
    // Where multiply_group leaves this thread's sums: rows row, row + 8, columns column + step(c).
    const int row = group * 64 + thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
    const int32_t token[2] = {ends.token[row], ends.token[row + 8]};
    const int64_t first_latent = ends.first_latent;
    const auto thresholds = thresholds_of(s, token, 0);  // on their way while products are
    products_wait<0>();
    fence_registers(sum);

    const auto p = [&](int r, int c) -> float& { return sum[c / 2 * 4 + r * 2 + c % 2]; };
    const auto step = [](int c) { return c / 2 * 8 + c % 2; };
    add_biases<2, kLatents / 4>(p, [&](int c) { return ends.bias[column + step(c)]; });
    free(last);  // and with it `ends`, which has been read
    deliver<2, kLatents / 4, 4>(s, token, thresholds, p, first_latent, first_latent + kLatents,
                                column, step);
  }
};

template <bool kBf16>
__global__ void __launch_bounds__(kThreads, 1)
    scan_groups(Scan s, const __grid_constant__ TensorMap narrow,
                const __grid_constant__ TensorMap wide) {
  const int64_t slots = slots_here(s), depth = (s.x.width * 2 + kRowBytes - 1) / kRowBytes;
  if (slots == 0) return;
  const bool is_narrow = slots <= kSomeTokens;
  unsigned char* const stages = shared<unsigned char>();
  Ring& ring = *shared<Ring>(kStages * kStageBytes);
  if (threadIdx.x == 0) {
    prefetch_map(is_narrow ? &narrow : &wide);
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&ring.full[i], kGroup);
      barrier_init(&ring.empty[i], 2 * kGroup / 32);
    }
    barrier_init_done();
  }
  sync_threads();

  const int group = threadIdx.x / kGroup, thread = threadIdx.x % kGroup;
  if (group == 0) {
    give_registers<kProducerRegisters>();
    if (is_narrow)
      Producer<kNarrow>{s, &narrow, ring, stages, slots, depth, thread, {}, {}}.run();
    else
      Producer<kWide>{s, &wide, ring, stages, slots, depth, thread, {}, {}}.run();
  } else {
    take_registers<kConsumerRegisters>();
    if (is_narrow)
      Consumer<kBf16, kNarrow>{s, ring, stages, depth, group - 1, thread, {}}.run();
    else
      Consumer<kBf16, kWide>{s, ring, stages, depth, group - 1, thread, {}}.run();
  }
}

#else

// Chosen for compute capability 9.0 alone.
template <bool kBf16>
__global__ void scan_groups(Scan, const __grid_constant__ TensorMap,
                            const __grid_constant__ TensorMap) {
  __trap();
}

#endif

template <bool kBf16>
void run(const Scan& s, Stream stream) {
  const Encoder& e = s.encoder;
  const auto map = [&](int rows) { return tensor_map(e.W.data, kBf16, e.count, e.W.width, rows); };
  // A multiprocessor has room for one block. Narrow tiles are more; only the device knows whether
  // it will be these.
  const int64_t tiles = Tiles<kTokens, kNarrow>(s.slots, e.count).count();
  const int64_t blocks = std::min<int64_t>(tiles, device().multiprocessors);
  launch(scan_groups<kBf16>, {blocks, kThreads, kShared}, stream, s, map(kNarrow), map(kWide));
}

}  // namespace

bool takes_wgmma(const Scan& s) {
#ifdef SAESTEER_SM90A
  return takes_mma(s) && device().is_hopper;
#else
  (void)s;
  return false;
#endif
}

void scan_wgmma(const Scan& s, Stream stream) {
  s.x.dtype == Dtype::bf16 ? run<true>(s, stream) : run<false>(s, stream);
}

}  // namespace saesteer::cuda
