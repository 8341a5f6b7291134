// What the host side (cpu.cpp) hands to the kernel of one SIMD level (cpu_kernel.cpp).
#pragma once

#include <stdint.h>

#include "../common/kernel.h"

namespace vsod {
namespace dense_crf {

// All tensors are contiguous.
struct Problem {
  int64_t batch, classes, height, width;  // classes: 0 for a foreground probability
  const float* prob;                      // (batch, height, width) or (batch, classes, ...)
  const void* image;                      // (batch, 3, height, width), uint8 or float32, 0..255
  bool image_is_float;
  float* out;  // shaped like prob
  int64_t iterations;
  float gaussian_sxy, gaussian_weight;                    // weight 0: no such kernel
  float bilateral_sxy, bilateral_srgb, bilateral_weight;  // likewise
  int64_t hash_capacity;  // first size of the hash table, 0: by the size of the image
  int64_t threads;        // at most so many run the body of Parallel
};

struct Kernel {
  // Returns 0, or the bytes that there is no memory for.
  int64_t (*forward)(const Problem&, Parallel);
};

}  // namespace dense_crf
}  // namespace vsod
