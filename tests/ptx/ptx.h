// What PTX is loaded and launched by, here: on the CPU, in this process's memory. For C and ctypes.
#pragma once

#include <cstdint>

extern "C" {

// A module of PTX text; null if it cannot be read, and ptx_error() tells why.
void* ptx_load(const char* text);
void ptx_unload(void* module);

// Bytes of the kernel's i-th parameter; 0 where it has so many no more, -1 where there is no such
// kernel.
int ptx_parameter_bytes(void* module, const char* kernel, int i);

// Threads of a block that the kernel asks for by .reqntid or .maxntid, and its static shared
// memory.
int ptx_most_threads(void* module, const char* kernel);
int ptx_static_shared(void* module, const char* kernel);

// Runs a kernel to its end. arguments[i] points at the i-th parameter; `together`: all blocks are
// resident at once. Returns null, or what went wrong.
const char* ptx_launch(void* module, const char* kernel, const uint32_t grid[3],
                       const uint32_t block[3], uint32_t dynamic_shared, bool together,
                       const void* const* arguments);

const char* ptx_error();

// The order in which warps take turns, and what lands late.
void ptx_settle(uint32_t seed);

// From here on kernels are Triton's, or not. Threads of its that hold copies of an element all
// write them, though copies of what others change meanwhile may differ; it moves sums behind
// wgmma.fence, which the assembler puts right; and some releases put no fence before what wgmma
// reads.
void ptx_take_as_tritons(bool on);

// From here on, of kernels whose name has `kernel` in it, the which-th instruction that begins with
// `words` is not run; null: all are. ptx_left_out() tells how often it was passed over, -1 if no
// kernel that was launched had it.
void ptx_leave_out(const char* kernel, const char* words, int which);
int ptx_left_out();

// From here on memory traffic is counted, from nothing; ptx_traffic() tells a line for each
// instruction that had some: the kernel, its line, 0 read, 1 written or 2 shared, how often it ran,
// bytes, in how many parts they came, and the fewest parts that they could come in.
void ptx_count_traffic(bool on);
const char* ptx_traffic();

// Writes a tensor map, 128 bytes aligned to 64, under the driver's rules. Dimensions run from the
// innermost; strides are in bytes, from the second dimension on; swizzle: 0, 32, 64 or 128 bytes.
// Returns null, or what is wrong.
const char* ptx_tensor_map(void* map, int element_bytes, int rank, const void* base,
                           const uint64_t* sizes, const uint64_t* strides, const uint32_t* box,
                           int swizzle);
}
