// The CUDA library's registration: which op each kernel serves, and the architectures that nvcc
// compiled for. Device code is in the .cu files beside it and includes no torch header.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_IMPL(saesteer, CUDA, m) { (void)m; }

extern "C" __attribute__((visibility("default"))) const char* saesteer_cuda_architectures() {
  return SAESTEER_CUDA_ARCHITECTURES;
}
