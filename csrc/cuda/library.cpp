// The CUDA library's registration: which kernel serves which op. Device code is in the .cu files
// beside it and includes no torch header.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_IMPL(saesteer, CUDA, m) { (void)m; }
