// What the CPU module says of itself, as torch ops without tensors: what was built, and what this
// CPU can do.  The kernels register in each op's cpu.cpp.

#include <torch/csrc/stable/library.h>

#include <chrono>
#include <cstdlib>
#include <stdexcept>
#include <string>

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

// Lines "name: value".
std::string build_info() {
  return "compiler: " VSOD_COMPILER "\ntorch: " VSOD_BUILD_TORCH "\nrevision: " VSOD_REVISION
#if defined(VSOD_X86_LEVELS)
         "\nlevels: portable, avx2, avx512, avx512bf16"
#else
         "\nlevels: portable"
#endif
         "\nlevel: " +
         std::string(cpu_level_name(cpu_level()));
}

}  // namespace

CpuLevel cpu_level() {
  static const CpuLevel level = detect();
  return level;
}

bool level_is_known() {
  try {
    cpu_level();
  } catch (const std::runtime_error&) {
    return false;
  }
  return true;
}

const char* cpu_level_name(CpuLevel level) { return kNames[int(level)]; }

STABLE_TORCH_LIBRARY_FRAGMENT(vsod_ops, m) {
  m.def("cpu_build_info() -> str");
  // FLOP/s that a loop of multiply-adds in registers reaches on torch's threads.
  m.def("cpu_peak_flops(str dtype) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(vsod_ops, CompositeExplicitAutograd, m) {
  m.impl("cpu_build_info", TORCH_BOX(&build_info));
  m.impl("cpu_peak_flops", TORCH_BOX(&peak_flops));
}

}  // namespace vsod
