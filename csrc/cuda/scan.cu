// Which kernel scans how many tokens.
#include "scan.h"
#include "setting.h"

namespace saesteer::cuda {

namespace {

// SAESTEER_SCAN=mma leaves out scan_wgmma, =simt both that use tensor cores: for finding out which
// kernel is wrong, and for going on without it.
bool allowed(const char* kernel) {
  const auto only = setting("SAESTEER_SCAN", {"mma", "simt"});
  return only.empty() || only == kernel;
}

}  // namespace

bool uses_mma(const Scan& s) { return takes_mma(s) && allowed("mma"); }

void scan(const Scan& all, Stream stream) {
  Scan s = all;
  s.least = 1, s.most = s.slots;
  if (!uses_mma(s)) return scan_simt(s, stream);
  if (s.slots <= kFewTokens) return scan_mma(s, stream);
  const bool by_groups = takes_wgmma(s) && allowed("wgmma");
  if (s.open_count && !(by_groups && s.slots > kSomeTokens)) {
    // Only the device knows how many are in use: the kernel that is not meant leaves at once.
    // Where scan_wgmma follows, few in use among more than kSomeTokens are too rare for a launch.
    s.most = kFewTokens;
    scan_mma(s, stream);
    s.least = kFewTokens + 1, s.most = s.slots;
  }
  by_groups ? scan_wgmma(s, stream) : scan_mma(s, stream);
}

}  // namespace saesteer::cuda
