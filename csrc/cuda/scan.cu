// Which kernel scans how many tokens.
#include "scan.h"
#include "setting.h"

namespace saesteer::cuda {

namespace {

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
  const bool by_groups = takes_wgmma(s) && allowed("wgmma"), many = by_groups && s.slots > kSome;
  const int64_t limit = many ? kSome : kFew;
  const auto fewer = many ? scan_wgmma : scan_mma, more = by_groups ? scan_wgmma : scan_mma;
  if (s.slots <= limit) return fewer(s, stream);
  if (s.open_count) {
    // Only the device knows how many are in use: the kernel that is not meant leaves at once.
    s.most = limit;
    fewer(s, stream);
    s.least = limit + 1, s.most = s.slots;
  }
  more(s, stream);
}

}  // namespace saesteer::cuda
