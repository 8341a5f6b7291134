// The arithmetic ceiling of each SIMD level: a loop of multiply-adds in registers (peak.cpp).
#pragma once

#include <stdint.h>

namespace vsod {

// Runs `steps` steps and returns the floating-point operations done.  Each level has a table
// `peak_loops` of them by Dtype, kFloat32 and kBFloat16 of which matter.
using PeakLoop = double (*)(int64_t steps);

}  // namespace vsod
