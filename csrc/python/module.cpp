// saesteer_fast._build: what is no tensor op. Facts about this build and this processor.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "cpu/isa.h"

namespace py = pybind11;

namespace {

// 0x020a000000000000 -> "2.10"
std::string torch_target() {
  const auto version = static_cast<std::uint64_t>(SAESTEER_TORCH_TARGET);
  return std::to_string(version >> 56) + "." + std::to_string((version >> 48) & 0xff);
}

py::dict facts() {
  py::dict d;
  d["compiler"] = SAESTEER_COMPILER;
  d["flags"] = SAESTEER_FLAGS;
  d["torch"] = SAESTEER_TORCH_VERSION;
  d["torch_target"] = torch_target();
  d["instruction_sets"] = py::str(SAESTEER_INSTRUCTION_SETS).attr("split")();
  d["cuda_compiler"] = SAESTEER_CUDA_COMPILER;
  d["cuda_architectures"] = py::str(SAESTEER_CUDA_ARCHITECTURES).attr("split")();
  d["no_cuda_reason"] = SAESTEER_NO_CUDA_REASON;
  return d;
}

py::tuple instruction_set() {
  using namespace saesteer::cpu;
  const std::string best = isa_name(detected_isa()), used = isa_name(isa_in_use());
  return py::make_tuple(used, used == best
                                  ? "the best built for this processor"
                                  : "SAESTEER_CPU_ISA names it; this processor has " + best);
}

}  // namespace

PYBIND11_MODULE(_build, m) {
  m.doc() = "Facts about this build of saesteer_fast and about this processor.";
  m.def("facts", &facts,
        "How the libraries were compiled: compiler, flags, torch (the version compiled against),\n"
        "torch_target (the oldest that they run on), instruction_sets, cuda_compiler,\n"
        "cuda_architectures (none: not built) and no_cuda_reason.");
  m.def("instruction_set", &instruction_set,
        "The instruction set whose CPU kernels run here, one of facts()'s, and why.\n"
        "RuntimeError if SAESTEER_CPU_ISA names none that this processor has.");
}
