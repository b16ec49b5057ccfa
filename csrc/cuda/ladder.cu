// The decision ladder for a call's tokens: L0 and the write of what it settles in one kernel, the
// scan of the others (scan.h), and the write of these; for few tokens all of it in one kernel
// (ladder_once.cu). And L0's halves alone: project, add_directions.
#include <algorithm>
#include <utility>

#include "kernels.h"
#include "ladder.h"

namespace saesteer::cuda {
namespace {

// That a multiprocessor runs at once. Three chunks of a row under way (token.h) fit 64 of its
// registers a thread; those of fp32 have twice the bytes.
template <int kDtype>
constexpr int kBlocks =
    65536 / (kTokenThreads * (kDtype == static_cast<int>(Dtype::f32) ? 80 : 64));

// One block a token.
template <int kDtype>
__global__ void __launch_bounds__(kTokenThreads, kBlocks<kDtype>) level0(Ladder c) {
  fix_dtypes<kDtype>(c.x, c.encoder.W, c.directions, c.y);
  const int64_t token = blockIdx.x;
  const float value = first_value(c, token);
  keep_and_write<kDtype>(c, token, measure(c, token), c.directions, value);
}

template <int kDtype>
__global__ void __launch_bounds__(kTokenThreads, kBlocks<kDtype>) settle(Ladder c) {
  fix_dtypes<kDtype>(c.x, c.encoder.W, c.directions, c.y);
  settle_tokens<kDtype>(c);
}

struct Project {
  Rows x, rows;
  int64_t count;
  const float* bias;
  float* p;
};

template <int kDtype>
__global__ void __launch_bounds__(kTokenThreads, kBlocks<kDtype>) project_rows(Project c) {
  fix_dtypes<kDtype>(c.x, c.rows);
  const int64_t token = blockIdx.x;
  project_token(c.x[token], c.x.dtype, c.rows, c.bias, c.count, nullptr, c.count,
                c.p + token * c.count, shared<float>());
}

struct Add {
  Rows x, rows;
  int64_t count;
  Values coef;
  OutRows y;
};

template <int kDtype>
__global__ void __launch_bounds__(kTokenThreads, kBlocks<kDtype>) add_rows(Add c) {
  fix_dtypes<kDtype>(c.x, c.rows, c.y);
  const int64_t token = blockIdx.x;
  add_to_token<kDtype>(c.x[token], c.rows, c.count, c.coef.data + token * c.coef.stride, c.y[token],
                       c.x.dtype);
}

constexpr int64_t kWorkspaceBytes = int64_t{1} << 20;
constexpr int64_t kCountBytes = 16;  // Open::count, padded

int64_t bytes_a_token(int64_t features) { return 4 + 8 * features; }

// Tokens taken at once, so that what is kept of them stays below a megabyte; but no fewer than
// the largest tile's.
int64_t tokens_at_once(int64_t features) {
  return std::max<int64_t>(128, (kWorkspaceBytes - kCountBytes) / bytes_a_token(features));
}

Open carve(void* workspace, int64_t tokens, int64_t features) {
  char* at = static_cast<char*>(workspace);
  auto take = [&](int64_t bytes) { return std::exchange(at, at + bytes); };
  auto* count = reinterpret_cast<int32_t*>(take(kCountBytes));
  auto* token = reinterpret_cast<int32_t*>(take(4 * tokens));
  auto* p = reinterpret_cast<float*>(take(4 * tokens * features));
  auto* beaten = reinterpret_cast<int32_t*>(take(4 * tokens * features));
  return {tokens > kFewTokens ? count : nullptr, token, p, beaten};
}

Scan scan_of(const Ladder& c) {
  Scan s{};
  s.x = c.x, s.encoder = c.encoder, s.features = c.features;
  s.slots = c.tokens, s.open_count = c.open.count, s.token = c.open.token;
  s.p = c.open.p, s.beaten = c.open.beaten;
  return s;
}

void climb(const Ladder& c, Dtype directions, Stream stream) {
  const bool scans = c.features.count > 0 && c.encoder.k < c.encoder.count;
  if (scans && climb_once(c, scan_of(c), directions, stream)) return;
  for_dtypes(c.x.dtype, c.encoder.W.dtype, directions, [&](auto dtype) {
    const int64_t shared = level0_bytes(c.features.count);
    if (c.open.count) zero(c.open.count, sizeof *c.open.count, stream);
    launch(level0<dtype()>, {c.tokens, kTokenThreads, shared}, stream, c);
    if (!scans) return;
    scan(scan_of(c), stream);
    // How many tokens are open, only the device knows. A multiprocessor runs 2,048 threads at most.
    const int64_t blocks =
        std::min<int64_t>(c.tokens, 2048 / kTokenThreads * device().multiprocessors);
    launch(settle<dtype()>, {blocks, kTokenThreads, shared}, stream, c);
  });
}

// One piece of the tokens after the other, in the same workspace.
void climb_all(Ladder c, Dtype directions, void* workspace, Stream stream) {
  const int64_t F = c.features.count, all = c.tokens;
  const Ladder whole = c;
  in_pieces(all, tokens_at_once(F), [&](int64_t first, int64_t count) {
    c.x = from(whole.x, first);
    c.tokens = count;
    c.open = carve(workspace, count, F);
    if (whole.acts) c.acts = whole.acts + first * F;
    if (whole.mask) c.mask = whole.mask + first;
    if (whole.y.data) c.y = from(whole.y, first);
    c.values.data = whole.values.data + first * whole.values.stride;
    climb(c, directions, stream);
  });
}

}  // namespace

int64_t most_features() { return (device().shared_limit - level0_bytes(0)) / 4; }

int64_t ladder_workspace(int64_t tokens, int64_t features) {
  return kCountBytes + std::min(tokens, tokens_at_once(features)) * bytes_a_token(features);
}

void steer(const Rows& x, int64_t tokens, const Encoder& encoder, const Rows& directions,
           const Features& features, const Values& values, const bool* mask, const OutRows& y,
           void* workspace, void* stream) {
  Ladder c{};
  c.x = x, c.tokens = tokens, c.encoder = encoder, c.features = features;
  c.directions = directions, c.values = values, c.mask = mask, c.y = y;
  climb_all(c, directions.dtype, workspace, static_cast<Stream>(stream));
}

void feature_acts(const Rows& x, int64_t tokens, const Encoder& encoder, const Features& features,
                  float* acts, void* workspace, void* stream) {
  Ladder c{};
  c.x = x, c.tokens = tokens, c.encoder = encoder, c.features = features, c.acts = acts;
  climb_all(c, x.dtype, workspace, static_cast<Stream>(stream));
}

void project(const Rows& x, int64_t tokens, const Rows& rows, int64_t count, const float* bias,
             float* p, void* stream) {
  for_dtypes(x.dtype, rows.dtype, rows.dtype, [&](auto dtype) {
    in_pieces(tokens, kMostBlocks, [&](int64_t first, int64_t some) {
      launch(project_rows<dtype()>, {some, kTokenThreads, kTokenScratch * 4},
             static_cast<Stream>(stream),
             Project{from(x, first), rows, count, bias, p + first * count});
    });
  });
}

void add_directions(const Rows& x, int64_t tokens, const Rows& directions, int64_t features,
                    const Values& coef, const OutRows& y, void* stream) {
  for_dtypes(x.dtype, directions.dtype, directions.dtype, [&](auto dtype) {
    in_pieces(tokens, kMostBlocks, [&](int64_t first, int64_t some) {
      const Values terms{coef.data + first * coef.stride, coef.stride};
      launch(add_rows<dtype()>, {some, kTokenThreads}, static_cast<Stream>(stream),
             Add{from(x, first), directions, features, terms, from(y, first)});
    });
  });
}

}  // namespace saesteer::cuda
