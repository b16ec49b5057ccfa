// What a test sets and counts of the emulated GPU, for ctypes.
#include <emulator.h>

using namespace saesteer::cuda;

extern "C" {

void settle_machine(int multiprocessors, bool hopper, uint32_t seed) {
  emulated::settings = {multiprocessors, hopper, seed};
}

int launches() { return emulated::machine().launches; }
}
