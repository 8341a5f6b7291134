// What the CUDA module says of itself, as torch ops without tensors: what was built, and whether it
// runs here.  The kernels register in each op's cuda.cu.

#include <torch/csrc/stable/library.h>

#include <string>

#include "probe.h"

namespace {

// Lines "name: value".
std::string build_info() {
  return "compiler: " VSOD_COMPILER "\ntorch: " VSOD_BUILD_TORCH "\nrevision: " VSOD_REVISION
         "\narchitectures: " VSOD_ARCHITECTURES;
}

std::string probe(int64_t device) { return vsod::cuda_probe(int(device)); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vsod_ops, m) {
  m.def("cuda_build_info() -> str");
  // Runs one small kernel on a GPU: "" if its result is right, else what went wrong, for example
  // that this build has no code for the GPU's architecture.
  m.def("cuda_probe(int device) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(vsod_ops, CompositeExplicitAutograd, m) {
  m.impl("cuda_build_info", TORCH_BOX(&build_info));
  m.impl("cuda_probe", TORCH_BOX(&probe));
}
