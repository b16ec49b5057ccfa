// Which kernel scans how many tokens.
#include "scan.h"
#include "setting.h"

namespace saesteer::cuda {

namespace {

// Up to so many tokens the reading of W_enc is what takes the time.
constexpr int64_t kFew = 64;

// SAESTEER_SCAN=mma leaves out scan_wgmma, =simt both that use tensor cores: for finding out which
// kernel is wrong, and for going on without it.
bool allowed(const char* kernel) {
  const std::string only = setting("SAESTEER_SCAN", {"mma", "simt"});
  return only == "" || only == kernel;
}

}  // namespace

bool uses_mma(const Scan& s) { return takes_mma(s) && allowed("mma"); }

void scan(const Scan& all, Stream stream) {
  Scan s = all;
  s.least = 1, s.most = s.slots;
  if (!uses_mma(s)) return scan_simt(s, stream);
  // Where only the device knows how many are in use, the kernel that is not meant leaves at once.
  s.most = s.slots < kFew ? s.slots : kFew;
  if (s.open_count || s.slots <= kFew) scan_mma(s, stream);
  if (s.slots <= kFew) return;
  s.least = kFew + 1, s.most = s.slots;
  takes_wgmma(s) && allowed("wgmma") ? scan_wgmma(s, stream) : scan_mma(s, stream);
}

}  // namespace saesteer::cuda
