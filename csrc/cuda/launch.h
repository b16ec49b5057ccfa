// How kernels are launched, and what has to be known of the device for it. Host code.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace saesteer::cuda {

using Stream = cudaStream_t;

inline void checked(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it must not surface as a later call's
  throw std::runtime_error(std::string("saesteer: ") + what + ": " + cudaGetErrorString(error));
}

// What `ask` answers, which is always the same for a key: each thread asks once.
template <class Key, class Ask>
const auto& once(const Key& key, const Ask& ask) {
  thread_local std::map<Key, decltype(ask())> answers;
  const auto found = answers.find(key);
  return found != answers.end() ? found->second : answers.emplace(key, ask()).first->second;
}

// What of a device does not change. How much of it a context has, as a green one, is not known
// here.
struct Device {
  int number, multiprocessors;
  bool is_hopper, has_together;  // launches whose blocks run at once
  int64_t shared_limit;          // the most shared memory that a block may ask for
};

// The current one.
inline const Device& device() {
  int number;
  checked(cudaGetDevice(&number), "cudaGetDevice");
  return once(number, [&] {
    const auto attribute = [&](cudaDeviceAttr which) {
      int value;
      checked(cudaDeviceGetAttribute(&value, which, number), "cudaDeviceGetAttribute");
      return value;
    };
    return Device{number, attribute(cudaDevAttrMultiProcessorCount),
                  attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
                      attribute(cudaDevAttrComputeCapabilityMinor) == 0,
                  attribute(cudaDevAttrCooperativeLaunch) != 0,
                  attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  });
}

struct Shape {
  int64_t blocks;
  int threads;
  int64_t shared = 0;
  bool together = false;  // all blocks run at once, so that they may wait for each other: sync_grid
};

constexpr int64_t kPlainShared = 48 << 10;  // what every kernel may have unasked

// As much as the device has: with as much as is needed one thread could take back what another has
// allowed and is about to launch with.
template <class Kernel>
void allow_shared(Kernel* kernel) {
  checked(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(device().shared_limit)),
          "shared memory");
}

// The most blocks that a launch may have together; 0 where the device has no such launches.
template <class Kernel>
int64_t most_together(const Device& here, Kernel* kernel, int threads, int64_t shared) {
  if (!here.has_together) return 0;
  const int blocks = once(std::tuple(here.number, kernel, threads, shared), [&] {
    if (shared > kPlainShared) allow_shared(kernel);
    int found;
    checked(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found, kernel, threads, shared),
            "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    return found;
  });
  return int64_t{blocks} * here.multiprocessors;
}

// False where the blocks should run together, and the part of the device that this context has, as
// a green one, does not hold them.
template <class... Parameters, class... Arguments>
bool launch(void (*kernel)(Parameters...), const Shape& shape, Stream stream,
            const Arguments&... arguments) {
  const bool allowed = shape.shared > kPlainShared;
  if (allowed) once(std::pair(device().number, kernel), [&] { return allow_shared(kernel), true; });
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(shape.blocks);
  config.blockDim = shape.threads;
  config.dynamicSmemBytes = shape.shared;
  config.stream = stream;
  config.attrs = &together;
  config.numAttrs = shape.together;
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  // What is allowed may hold for a context alone, and the device may have several.
  if (allowed && error == cudaErrorInvalidValue) {
    cudaGetLastError();
    allow_shared(kernel);
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  if (shape.together && error == cudaErrorCooperativeLaunchTooLarge) {
    cudaGetLastError();
    return false;
  }
  checked(error, "launch");
  return true;
}

inline void zero(void* at, int64_t bytes, Stream stream) {
  checked(cudaMemsetAsync(at, 0, bytes, stream), "cudaMemsetAsync");
}

using TensorMap = CUtensorMap;

// The tensor map of a 16-bit matrix, for boxes of `box_rows` rows of 128 bytes. The driver's
// function is looked up, so that the library needs no libcuda to load.
inline TensorMap tensor_map(const void* matrix, bool is_bf16, int64_t rows, int64_t width,
                            int box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    checked(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                             cudaEnableDefault, &result),
            "cuTensorMapEncodeTiled");
    if (result != cudaDriverEntryPointSuccess)
      throw std::runtime_error("saesteer: the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(found);
  }();
  TensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(width) * 2};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  const auto make = [&] {
    return encode(&map,
                  is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
                  const_cast<void*>(matrix), sizes, strides, box, steps,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult error = make();
  // Unlike the runtime's functions, the driver's gives a new thread no context, and nor does
  // PyTorch's guard where the device is the current one already. Only then: a context that is
  // current, as a green one, would no longer be.
  if (error == CUDA_ERROR_INVALID_CONTEXT) {
    checked(cudaSetDevice(device().number), "cudaSetDevice");
    error = make();
  }
  if (error != CUDA_SUCCESS)
    throw std::runtime_error("saesteer: cuTensorMapEncodeTiled: error " + std::to_string(error));
  return map;
}

}  // namespace saesteer::cuda
