// The Python face of the CUDA module, vsod_ops._cuda: what was built, and whether it runs here.
// The ops themselves register with torch (STABLE_TORCH_LIBRARY_IMPL in each op's cuda.cu).

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "../dense_crf/fits.h"
#include "probe.h"

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = VSOD_COMPILER;
  info["torch"] = VSOD_BUILD_TORCH;
  info["revision"] = VSOD_REVISION;
  info["architectures"] = VSOD_ARCHITECTURES;
  return info;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of vsod_ops";
  m.def("build_info", &build_info, "Compiler, torch, revision and GPU architectures of this build");
  m.def("dense_crf_fits", &vsod::dense_crf_fits, VSOD_DENSE_CRF_FITS);
  m.def(
      "probe", [](int device) { return std::string(vsod::cuda_probe(device)); },
      pybind11::arg("device"),
      "Runs one small kernel on a GPU: \"\" if its result is right, else what went wrong, for\n"
      "example that this build has no code for the GPU's architecture");
}
