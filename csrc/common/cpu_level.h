// SIMD levels: kernels are compiled once for each, and the best that this CPU runs is chosen once.
#pragma once

namespace vsod {

enum class CpuLevel { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

// The best level of this CPU, lowered by VSOD_OPS_SIMD=portable|avx2|avx512|avx512bf16.
CpuLevel cpu_level();
const char* cpu_level_name(CpuLevel level);

}  // namespace vsod
