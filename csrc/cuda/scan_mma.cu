// The scan on tensor cores by warps (scan_mma.h), and which plan for how many tokens.
#include "scan_mma.h"

namespace saesteer::cuda {
namespace {

template <class P, bool kBf16>
__global__ void __launch_bounds__(P::kThreads, P::kBlocks) scan_16bit(Scan s) {
  mma::take_tiles<P, kBf16>(s);
}

template <class P, bool kBf16>
void run(const Scan& s, Stream stream) {
  launch_tiles<P>(scan_16bit<P, kBf16>, s, stream);
}

template <bool kBf16>
void run(const Scan& s, Stream stream) {
  if (s.slots <= mma::Fewest::kTokens)
    run<mma::Fewest, kBf16>(s, stream);
  else if (s.most <= mma::Few::kTokens || s.slots <= mma::Few::kTokens)
    run<mma::Few, kBf16>(s, stream);
  else
    run<mma::Many, kBf16>(s, stream);
}

}  // namespace

// Rows are made of aligned copies of 16 bytes, and their bytes are counted in 32 bits.
bool takes_mma(const Scan& s) {
  return s.x.dtype == s.encoder.W.dtype && s.x.dtype != Dtype::f32 && s.x.width % 8 == 0 &&
         s.x.width > 0 && s.x.width < 1 << 30 && reinterpret_cast<uintptr_t>(s.x.data) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(s.encoder.W.data) % 16 == 0;
}

void scan_mma(const Scan& s, Stream stream) {
  if (s.x.dtype == Dtype::bf16)
    run<true>(s, stream);
  else
    run<false>(s, stream);
}

}  // namespace saesteer::cuda
