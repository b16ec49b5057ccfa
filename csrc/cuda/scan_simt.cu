// The scan in fp32 multiply-adds: any dtypes, widths and alignments.
#include "scan.h"
#include "token.h"

namespace saesteer::cuda {
namespace {

constexpr int kThreads = 256, kSide = 16;
constexpr int kDepth = 32;    // columns of x and W at once
constexpr int kLatents = 64;  // a tile's
constexpr int kAcross = kLatents / kSide;
constexpr int kPad = 4;  // keeps 16-byte alignment and spreads the banks

// kRows: slots of a thread; a tile has 16 times as many.
template <int kRows>
constexpr int64_t kShared = kDepth * (kSide * kRows + kPad + kLatents + kPad) * 4;

// kCount rows, kDepth columns from `column` on, on their way to shared memory.
template <int kCount>
struct Panel {
  static constexpr int kChunks = kCount * kDepth / kChunk;
  static constexpr int kEach = (kChunks + kThreads - 1) / kThreads;
  float v[kEach][kChunk];

  template <class Row>
  __device__ __forceinline__ void load(Dtype dtype, int64_t width, int64_t column, const Row& row) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int q = threadIdx.x + i * kThreads;
      const int64_t chunk = column / kChunk + q % (kDepth / kChunk);
      const void* from = q < kChunks ? row(q / (kDepth / kChunk)) : nullptr;
      if (from && chunk < chunks(width))
        load8(from, dtype, width, chunk, aligned(from), v[i]);
      else
        for (float& e : v[i]) e = 0;
    }
  }
  // to[column][row]
  __device__ __forceinline__ void store(float* to) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int q = threadIdx.x + i * kThreads;
      if (q >= kChunks) continue;
      float* at = to + q % (kDepth / kChunk) * kChunk * (kCount + kPad) + q / (kDepth / kChunk);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) at[e * (kCount + kPad)] = v[i][e];
    }
  }
};

// kCount floats next to each other.
template <int kCount>
__device__ __forceinline__ void read(const float* from, float (&v)[kCount]) {
  if constexpr (kCount % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = from[i];
  }
}

template <int kDtype, int kRows>
__global__ void __launch_bounds__(kThreads, 2) scan_any(Scan s) {
  constexpr int kTokens = kSide * kRows;
  fix_dtypes<kDtype>(s.x, s.encoder.W);
  const int64_t slots = slots_here(s), N = s.encoder.count, d = s.x.width;
  const int across = threadIdx.x % kSide, down = threadIdx.x / kSide;
  float* const left = shared<float>();
  float* const right = left + kDepth * (kTokens + kPad);

  const Tiles<kTokens, kLatents> tiles(slots, N);
  for (int64_t tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x) {
    int64_t first_slot, first_latent;
    tiles.locate(tile, first_slot, first_latent);
    if (!sync_threads_or(any_open(s, first_slot, kTokens, slots, threadIdx.x, kThreads))) continue;

    const auto x_row = [&](int i) -> const void* {
      const int64_t token = token_of(s, first_slot + i, slots);
      return token < 0 ? nullptr : s.x[token];
    };
    const auto W_row = [&](int i) -> const void* {
      return first_latent + i < N ? s.encoder.W[first_latent + i] : nullptr;
    };
    Panel<kTokens> x;
    Panel<kLatents> W;
    float sum[kRows][kAcross] = {};
    x.load(s.x.dtype, d, 0, x_row);
    W.load(s.encoder.W.dtype, d, 0, W_row);
    for (int64_t column = 0; column < d; column += kDepth) {
      sync_threads();
      x.store(left);
      W.store(right);
      sync_threads();
      if (column + kDepth < d) {
        x.load(s.x.dtype, d, column + kDepth, x_row);
        W.load(s.encoder.W.dtype, d, column + kDepth, W_row);
      }
#pragma unroll 8
      for (int i = 0; i < kDepth; ++i) {
        float a[kRows], b[kAcross];
        read(left + i * (kTokens + kPad) + down * kRows, a);
        read(right + i * (kLatents + kPad) + across * kAcross, b);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int c = 0; c < kAcross; ++c) sum[r][c] = fmaf(a[r], b[c], sum[r][c]);
      }
    }

    const auto slot = [&](int r) { return first_slot + down * kRows + r; };
    deliver<kRows, kAcross, kSide>(
        s, slots, [&](int r, int c) -> float& { return sum[r][c]; }, slot, first_latent,
        first_latent + kLatents, across * kAcross, [](int c) { return c; });
  }
}

template <int kDtype, int kRows>
void run(const Scan& s, Stream stream) {
  const int64_t tiles = Tiles<kSide * kRows, kLatents>(s.slots, s.encoder.count).count();
  const int64_t blocks = balanced(tiles, 2 * multiprocessors());
  launch(scan_any<kDtype, kRows>, {blocks, kThreads, kShared<kRows>}, stream, s);
}

template <int kDtype>
void run(Scan s, Stream stream) {
  constexpr int kFewRows = 1, kManyRows = 8;
  s.least = 1, s.most = kSide * kFewRows;
  run<kDtype, kFewRows>(s, stream);
  if (s.slots <= s.most) return;
  s.least = s.most + 1, s.most = s.slots;
  run<kDtype, kManyRows>(s, stream);
}

}  // namespace

void scan_simt(const Scan& s, Stream stream) {
  if (s.x.dtype == Dtype::f32 && s.encoder.W.dtype == Dtype::f32)
    run<static_cast<int>(Dtype::f32)>(s, stream);
  else
    run<-1>(s, stream);
}

}  // namespace saesteer::cuda
