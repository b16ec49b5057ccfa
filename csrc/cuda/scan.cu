// Which kernel scans how many tokens.
#include "scan.h"
#include "setting.h"

namespace saesteer::cuda {

namespace {

// Up to so many tokens the reading of W_enc is what takes the time, and smaller tiles stop sooner.
constexpr int64_t kFew = 64;
// Where only the device knows how many are in use, but of more slots than these, so few are not
// worth a launch that mostly leaves at once.
constexpr int64_t kSome = 512;

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
  if (s.slots <= kFew) return scan_mma(s, stream);
  const bool by_groups = takes_wgmma(s) && allowed("wgmma");
  if (s.open_count && !(by_groups && s.slots > kSome)) {
    s.most = kFew;
    scan_mma(s, stream);
    s.least = kFew + 1, s.most = s.slots;
  }
  by_groups ? scan_wgmma(s, stream) : scan_mma(s, stream);
}

}  // namespace saesteer::cuda
