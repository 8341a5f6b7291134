// The arithmetic ceiling of each SIMD level: a loop of multiply-adds in registers (peak.cpp).
#pragma once

#include <stdint.h>

namespace vsod {

// Runs `steps` steps and returns the floating-point operations done.
namespace portable {
double multiply_add_loop(int64_t steps);
}
namespace avx2 {
double multiply_add_loop(int64_t steps);
}
namespace avx512 {
double multiply_add_loop(int64_t steps);
}
namespace avx512bf16 {
double multiply_add_loop(int64_t steps);
}

}  // namespace vsod
