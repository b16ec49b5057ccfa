// What this GPU keeps in the 128 bytes of a tensor map.
#pragma once

#include <cstdint>

namespace ptx {

struct TensorMap {
  static constexpr uint32_t kMagic = 0x7E45012A;
  uint32_t magic = kMagic;
  uint8_t rank, element_bytes, swizzle;  // swizzle: bytes, or 0
  uint64_t base;
  uint64_t strides[4];  // bytes, from the second dimension on
  uint32_t sizes[5];
  uint16_t box[5];
};
static_assert(sizeof(TensorMap) <= 128);

// How a swizzle of 128, 64 or 32 bytes moves 16 bytes at an address in shared memory.
inline uint64_t swizzled(uint64_t address, int bytes) {
  return address ^ ((address >> 7 & (bytes / 16 - 1)) << 4) * (bytes > 0);
}

}  // namespace ptx
