// The Python face of the CPU module, vsod_ops._cpu: what was built, and what this CPU can do.
// The ops themselves register with torch (STABLE_TORCH_LIBRARY_IMPL in each op's cpu.cpp).

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../dense_crf/fits.h"
#include "kernel.h"
#include "levels.h"
#include "parallel.h"
#include "peak.h"

namespace vsod {

VSOD_LEVEL_TABLES(PeakLoop, peak_loops)

namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512bf16"};

CpuLevel detect() {
  CpuLevel best = CpuLevel::kPortable;
#if defined(VSOD_X86_LEVELS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = CpuLevel::kAvx2;
  if (best == CpuLevel::kAvx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    best = CpuLevel::kAvx512;
  if (best == CpuLevel::kAvx512 && __builtin_cpu_supports("avx512bf16"))
    best = CpuLevel::kAvx512Bf16;
#endif
  const char* forced = std::getenv("VSOD_OPS_SIMD");
  if (!forced || !*forced) return best;
  for (int i = 0; i < 4; ++i)
    if (std::string(forced) == kNames[i]) {
      if (i > int(best))
        throw std::runtime_error(std::string("VSOD_OPS_SIMD=") + forced +
                                 ", but this CPU has only " + kNames[int(best)]);
      return CpuLevel(i);
    }
  throw std::runtime_error(std::string("VSOD_OPS_SIMD must be portable, avx2, avx512 or "
                                       "avx512bf16, got ") +
                           forced);
}

// Floating-point operations a second that registers alone can do, all threads together.
double peak_flops(const std::string& dtype) {
  if (dtype != "float32" && dtype != "bfloat16")
    throw std::invalid_argument("peak_flops: dtype must be float32 or bfloat16, got " + dtype);
  const PeakLoop loop = peak_loops(dtype == "float32" ? kFloat32 : kBFloat16);
  struct Context {
    PeakLoop loop;
    double flops;
  };
  double best = 0;
  for (int repeat = 0; repeat < 8; ++repeat) {
    Context context{loop, 0};
    const auto start = std::chrono::steady_clock::now();
    on_each_thread(
        [](void* p) {
          auto* c = static_cast<Context*>(p);
          const double flops = c->loop(2'000'000);
          static_assert(sizeof(double) == sizeof(uint64_t));
          c->flops = flops;  // the same value from each thread
        },
        &context);
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    const double rate = context.flops * torch::stable::get_num_threads() / seconds;
    if (rate > best) best = rate;
  }
  return best;
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = VSOD_COMPILER;
  info["torch"] = VSOD_BUILD_TORCH;
  info["revision"] = VSOD_REVISION;
#if defined(VSOD_X86_LEVELS)
  info["levels"] = "portable, avx2, avx512, avx512bf16";
#else
  info["levels"] = "portable";
#endif
  info["level"] = cpu_level_name(cpu_level());
  return info;
}

}  // namespace

CpuLevel cpu_level() {
  static const CpuLevel level = detect();
  return level;
}

const char* cpu_level_name(CpuLevel level) { return kNames[int(level)]; }

}  // namespace vsod

PYBIND11_MODULE(_cpu, m) {
  try {
    vsod::cpu_level();
  } catch (const std::exception& error) {
    throw pybind11::import_error(error.what());
  }
  m.doc() = "CPU kernels of vsod_ops";
  m.def("build_info", &vsod::build_info, "Compiler, torch, revision and SIMD levels of this build");
  m.def("dense_crf_fits", &vsod::dense_crf_fits, VSOD_DENSE_CRF_FITS);
  m.def("peak_flops", &vsod::peak_flops, pybind11::arg("dtype"),
        pybind11::call_guard<pybind11::gil_scoped_release>(),
        "FLOP/s that a loop of multiply-adds in registers reaches on torch's threads;\n"
        "dtype is \"float32\" or \"bfloat16\"");
}
