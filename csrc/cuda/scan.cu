// Which kernel scans how many tokens.
#include "scan.h"

namespace saesteer::cuda {

namespace {

// Up to so many tokens the reading of W_enc is what takes the time.
constexpr int64_t kFew = 64;

}  // namespace

void scan(const Scan& all, Stream stream) {
  Scan s = all;
  s.least = 1, s.most = s.slots;
  if (!takes_mma(s)) return scan_simt(s, stream);
  // Where only the device knows how many are in use, the kernel that is not meant leaves at once.
  s.most = s.slots < kFew ? s.slots : kFew;
  if (s.open_count || s.slots <= kFew) scan_mma(s, stream);
  if (s.slots <= kFew) return;
  s.least = kFew + 1, s.most = s.slots;
  takes_wgmma(s) ? scan_wgmma(s, stream) : scan_mma(s, stream);
}

}  // namespace saesteer::cuda
