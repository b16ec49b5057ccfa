// The scan in fp32 multiply-adds (scan_simt.h), and which plan for how many tokens.
#include "scan_simt.h"
#include "token.h"

namespace saesteer::cuda {
namespace {

template <class P, int kDtype>
__global__ void __launch_bounds__(P::kThreads, P::kBlocks) scan_any(Scan s) {
  fix_dtypes<kDtype>(s.x, s.encoder.W);
  simt::take_tiles<P>(s);
}

template <class P, int kDtype>
void run(const Scan& s, Stream stream) {
  launch_tiles<P>(scan_any<P, kDtype>, s, stream);
}

template <int kDtype>
void run(Scan s, Stream stream) {
  s.least = 1, s.most = s.slots;
  if (s.slots <= simt::Fewest::kTokens) return run<simt::Fewest, kDtype>(s, stream);
  if (s.slots <= simt::Few::kTokens) return run<simt::Few, kDtype>(s, stream);
  // Where only the device knows how many are in use, the kernel that is not meant leaves at once.
  if (s.open_count) {
    s.most = simt::Fewest::kTokens;
    run<simt::Fewest, kDtype>(s, stream);
    s.least = s.most + 1, s.most = s.slots;
  }
  run<simt::Many, kDtype>(s, stream);
}

}  // namespace

void scan_simt(const Scan& s, Stream stream) {
  if (s.x.dtype == Dtype::f32 && s.encoder.W.dtype == Dtype::f32)
    run<static_cast<int>(Dtype::f32)>(s, stream);
  else
    run<-1>(s, stream);
}

}  // namespace saesteer::cuda
