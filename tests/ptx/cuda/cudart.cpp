// What csrc/cuda needs of libcudart, for a device that is this process: kernels run as PTX, by
// ptx.h, to their end before their launch returns. What a device would refuse is refused.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <fatbinary_section.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <tuple>
#include <utility>

#include "../ptx.h"
#include "stream.h"

namespace {

// ---- the device ----

struct Device {
  int number = 0;
  int multiprocessors = 3, usable = 3;  // of the context
  int major = 8;                        // of the compute capability, whose minor is 0
  bool together = true;                 // whether it has cooperative launches
  int launches = 0;
  std::map<std::string, int> calls;  // of the runtime's functions and the driver's

  int most_shared() const { return (major >= 9 ? 227 : 163) << 10; }  // of a block
  int shared() const { return (major >= 9 ? 228 : 164) << 10; }       // of a multiprocessor
};
Device device;

// The devices that there have been so far.
int number_of(const Device& device) {
  static std::map<std::tuple<int, int, bool>, int> numbers;
  const std::tuple kind{device.multiprocessors, device.major, device.together};
  return numbers.try_emplace(kind, numbers.size()).first->second;
}

constexpr int kMostThreads = 1024, kPlainShared = 48 << 10;

struct Refusal {
  cudaError_t error = cudaSuccess;
  std::string text;
};
Refusal last;
// The driver's functions need a context, which a thread has from the runtime's that use the device.
thread_local bool has_context = false;

void require(bool holds, cudaError_t error, const std::string& text) {
  if (!holds) throw Refusal{error, text};
}

template <class F>
cudaError_t answer(const char* call, const F& work) {
  ++device.calls[call];
  try {
    work();
    return cudaSuccess;
  } catch (const Refusal& refusal) {
    last = refusal;
    return last.error;
  }
}

// ---- modules and kernels ----

struct FatHeader {
  uint32_t magic;
  uint16_t version, header_bytes;
  uint64_t bytes;
};
struct FatEntry {
  uint16_t kind, version;
  uint32_t header_bytes;
  uint64_t bytes;
};
constexpr uint32_t kFatMagic = 0xBA55ED50;
constexpr uint16_t kPtx = 1;

// The text of a fat binary that holds PTX alone, not compressed.
std::string ptx_of(const __fatBinC_Wrapper_t& wrapper) {
  const char* at = reinterpret_cast<const char*>(wrapper.data);
  FatHeader header;
  FatEntry entry;
  memcpy(&header, at, sizeof header);
  memcpy(&entry, at += header.header_bytes, sizeof entry);
  require(wrapper.magic == FATBINC_MAGIC && header.magic == kFatMagic && entry.kind == kPtx,
          cudaErrorInvalidKernelImage, "a fat binary without PTX");
  return {at + entry.header_bytes, entry.bytes};
}

// What one source file became; its PTX is read when a kernel of it is first used.
class Module {
 public:
  explicit Module(const void* binary) : binary_(*static_cast<const __fatBinC_Wrapper_t*>(binary)) {}
  Module(const Module&) = delete;
  ~Module() {
    if (loaded_) ptx_unload(loaded_);
  }

  void* loaded() {
    if (!loaded_) loaded_ = ptx_load(ptx_of(binary_).c_str());
    if (!loaded_) throw Refusal{cudaErrorInvalidPtx, ptx_error()};
    return loaded_;
  }

 private:
  const __fatBinC_Wrapper_t& binary_;
  void* loaded_ = nullptr;
};

struct Kernel {
  Module* module;
  std::string name;
  // Bytes of dynamic shared memory, by cudaFuncSetAttribute, in each context
  std::map<std::pair<int, int>, int> allowed_in = {};

  int& allowed() { return allowed_in[{device.number, device.usable}]; }
  int fixed_shared() const { return ptx_static_shared(module->loaded(), name.c_str()); }
  int most_shared() { return std::max(allowed(), kPlainShared - fixed_shared()); }
  int most_threads() const {
    const int threads = ptx_most_threads(module->loaded(), name.c_str());
    return threads > 0 ? threads : kMostThreads;
  }

  // Blocks that a multiprocessor holds at once, as far as one knows without ptxas: registers are
  // left out, and a launch that counts on them has to bound itself.
  int resident(int64_t threads, int64_t dynamic_shared) {
    if (dynamic_shared > most_shared()) return 0;
    const int64_t shared = (fixed_shared() + dynamic_shared + 127) / 128 * 128 + (1 << 10);
    const int64_t warps = (threads + 31) / 32;
    return static_cast<int>(std::min({int64_t{32}, 64 / warps, device.shared() / shared}));
  }
};

// By the address of the host's function of the same name.
std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> known;
  return known;
}

Kernel& kernel_of(const void* function) {
  const auto found = kernels().find(function);
  require(found != kernels().end(), cudaErrorInvalidDeviceFunction, "a kernel nobody registered");
  return found->second;
}

// ---- launches ----

void check_stream(cudaStream_t stream) {
  require(stream == kStream, cudaErrorInvalidResourceHandle, "another stream than was given");
}

bool is_together(const cudaLaunchConfig_t& config) {
  bool together = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    require(config.attrs[i].id == cudaLaunchAttributeCooperative, cudaErrorNotSupported,
            "a launch attribute other than cooperative");
    together = config.attrs[i].val.cooperative;
  }
  return together;
}

uint64_t count(const dim3& shape) { return uint64_t{shape.x} * shape.y * shape.z; }

void check_shape(const dim3& grid, const dim3& block, const Kernel& kernel) {
  require(count(grid) && grid.x < 1u << 31 && grid.y < 1 << 16 && grid.z < 1 << 16,
          cudaErrorInvalidConfiguration,
          "a launch of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
              std::to_string(grid.z) + " blocks");
  require(count(block) && count(block) <= uint64_t(kernel.most_threads()) && block.z <= 64,
          cudaErrorInvalidConfiguration,
          std::to_string(count(block)) + " threads a block; the kernel takes at most " +
              std::to_string(kernel.most_threads()));
}

void check_shared(uint64_t bytes, Kernel& kernel) {
  require(bytes <= uint64_t(kernel.most_shared()), cudaErrorInvalidValue,
          std::to_string(bytes) + " bytes of shared memory; the kernel may have " +
              std::to_string(kernel.most_shared()));
}

void check_together(const cudaLaunchConfig_t& config, Kernel& kernel) {
  require(device.together, cudaErrorNotSupported, "blocks together, which the device has not");
  const int resident = kernel.resident(count(config.blockDim), config.dynamicSmemBytes);
  const uint64_t held = uint64_t(resident) * device.usable;
  require(count(config.gridDim) <= held, cudaErrorCooperativeLaunchTooLarge,
          "more blocks together than the device holds: " + std::to_string(held));
}

void launch(const cudaLaunchConfig_t& config, Kernel& kernel, void** arguments) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const bool together = is_together(config);
  check_stream(config.stream);
  check_shape(grid, block, kernel);
  check_shared(config.dynamicSmemBytes, kernel);
  if (together) check_together(config, kernel);
  ++device.launches;
  const uint32_t blocks[] = {grid.x, grid.y, grid.z}, threads[] = {block.x, block.y, block.z};
  const auto shared = static_cast<uint32_t>(config.dynamicSmemBytes);
  const char* error = ptx_launch(kernel.module->loaded(), kernel.name.c_str(), blocks, threads,
                                 shared, together, arguments);
  if (error) throw Refusal{cudaErrorLaunchFailure, error};
}

int attribute(cudaDeviceAttr which) {
  switch (which) {
    case cudaDevAttrMultiProcessorCount:
      return device.multiprocessors;
    case cudaDevAttrComputeCapabilityMajor:
      return device.major;
    case cudaDevAttrComputeCapabilityMinor:
      return 0;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return device.most_shared();
    case cudaDevAttrCooperativeLaunch:
      return device.together;
    default:
      throw Refusal{cudaErrorInvalidValue, "device attribute " + std::to_string(which)};
  }
}

// ---- the driver's one function ----

bool is_16_bit(CUtensorMapDataType type) {
  return type == CU_TENSOR_MAP_DATA_TYPE_UINT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 ||
         type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

// Of what the driver takes: 16-bit elements side by side, zeros outside.
CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                      const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* steps, CUtensorMapInterleave interleave,
                      CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                      CUtensorMapFloatOOBfill fill) {
  ++device.calls["cuTensorMapEncodeTiled"];
  if (!has_context) return CUDA_ERROR_INVALID_CONTEXT;
  if (device.major < 9) return CUDA_ERROR_NOT_SUPPORTED;
  const int swizzled[] = {0, 32, 64, 128};
  const bool simple = is_16_bit(type) && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
                      swizzle <= CU_TENSOR_MAP_SWIZZLE_128B &&
                      fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE && rank <= 5 &&
                      std::all_of(steps, steps + rank, [](cuuint32_t step) { return step == 1; });
  if (!simple) return CUDA_ERROR_NOT_SUPPORTED;
  const char* error =
      ptx_tensor_map(map, 2, static_cast<int>(rank), base, sizes, strides, box, swizzled[swizzle]);
  return error ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

}  // namespace

extern "C" {

// ---- what nvcc puts into every object ----

void** __cudaRegisterFatBinary(void* binary) {
  return reinterpret_cast<void**>(new Module(binary));
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void** module) { delete reinterpret_cast<Module*>(module); }
void __cudaRegisterFunction(void** module, const char* function, char*, const char* name, int,
                            uint3*, uint3*, dim3*, dim3*, int*) {
  kernels()[function] = {reinterpret_cast<Module*>(module), name};
}

// The halves of kernel<<<...>>>(...), which launch.h never uses.
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) {
  return answer(__func__, [] { throw Refusal{cudaErrorNotSupported, "a launch by <<<>>>"}; });
}
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaErrorNotSupported;
}

// ---- the runtime's functions ----

cudaError_t cudaGetLastError() { return std::exchange(last.error, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t) { return last.text.c_str(); }

cudaError_t cudaGetDevice(int* which) {
  return answer(__func__, [&] { *which = device.number; });
}
cudaError_t cudaSetDevice(int which) {
  return answer(__func__, [&] {
    require(which == device.number, cudaErrorInvalidDevice, "another device than the current one");
    has_context = true;
    device.usable = device.multiprocessors;  // the primary one
  });
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int of) {
  return answer(__func__, [&] {
    require(of == device.number, cudaErrorInvalidDevice, "another device than the current one");
    *value = attribute(which);
  });
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute which, int value) {
  return answer(__func__, [&] {
    has_context = true;
    Kernel& kernel = kernel_of(function);
    require(which == cudaFuncAttributeMaxDynamicSharedMemorySize, cudaErrorNotSupported,
            "function attribute " + std::to_string(which));
    require(value >= 0 && value + kernel.fixed_shared() <= device.most_shared(),
            cudaErrorInvalidValue,
            std::to_string(value) + " bytes of shared memory beside the kernel's own " +
                std::to_string(kernel.fixed_shared()));
    kernel.allowed() = value;
  });
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks,
                                                                   const void* function,
                                                                   int threads, size_t shared,
                                                                   unsigned) {
  return answer(__func__, [&] {
    has_context = true;
    Kernel& kernel = kernel_of(function);
    require(threads > 0 && threads <= kernel.most_threads(), cudaErrorInvalidValue,
            std::to_string(threads) + " threads a block");
    *blocks = kernel.resident(threads, shared);
  });
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** arguments) {
  return answer(__func__, [&] {
    has_context = true;
    launch(*config, kernel_of(function), arguments);
  });
}

cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t stream) {
  return answer(__func__, [&] {
    has_context = true;
    check_stream(stream);
    memset(at, value, bytes);
  });
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned version,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  ++device.calls[__func__];
  const bool known = strcmp(name, "cuTensorMapEncodeTiled") == 0 && version >= 12000;
  const decltype(&cuTensorMapEncodeTiled) function = encode_tiled;
  *found = known ? reinterpret_cast<void*>(function) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// ---- for tests ----

void settle_machine(int multiprocessors, int usable, int major, bool together, uint32_t seed) {
  device.multiprocessors = multiprocessors, device.usable = usable;
  device.major = major, device.together = together;
  device.number = number_of(device);
  ptx_settle(seed);
}

int launches() { return device.launches; }

int usable() { return device.usable; }

// How often each function was called since this was last asked: a name and a number a line.
const char* calls() {
  static std::string told;
  told.clear();
  for (const auto& [name, count] : device.calls) told += name + ' ' + std::to_string(count) + '\n';
  device.calls.clear();
  return told.c_str();
}
}
