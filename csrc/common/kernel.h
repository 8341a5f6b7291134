// What the host side of every op and its CPU kernels share.
#pragma once

#include <stdint.h>

namespace vsod {

// Entries of a table of kernels.
enum Dtype { kFloat32, kFloat64, kFloat16, kBFloat16 };

// Runs body(context) once on each thread of torch's pool.
using Parallel = void (*)(void (*body)(void* context), void* context);

}  // namespace vsod
