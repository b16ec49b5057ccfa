// Whether this library holds code for the current device.
#include <cuda_runtime.h>

namespace {
__global__ void probe() {}
}  // namespace

extern "C" __attribute__((visibility("default"))) bool saesteer_cuda_runs_here() {
  cudaFuncAttributes attributes;
  const bool found = cudaFuncGetAttributes(&attributes, probe) == cudaSuccess;
  cudaGetLastError();  // a missing image must not surface as a later call's error
  return found;
}
