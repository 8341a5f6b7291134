// What the layer (cpu_layer.h) hands to the products of its projections (cpu_linear_kernel.cpp).
#pragma once

#include <stdint.h>

#include "../common/kernel.h"

namespace vsod {
namespace shunted_attention {

// A (rows, parts * channels) matrix, gathered: column c * parts + j of row m is number c of the
// `channels` at data + starts[m * parts + j].
struct Gathered {
  const float* data;
  const int64_t* starts;
  int64_t rows, parts, channels;
};

struct Linear {
  // Numbers of the copy that pack() makes of a matrix; `channels` must be whole vectors.
  int64_t (*packed_numbers)(int64_t rows, int64_t depth);
  void (*pack)(const Gathered&, float* packed, Parallel);
  // out (rows, outputs) = packed (rows, depth) @ weight (outputs, depth)^T + bias.  Returns 0, or
  // the bytes of scratch that there is no memory for.
  int64_t (*run)(const float* packed, int64_t rows, int64_t depth, const float* weight,
                 const float* bias, int64_t outputs, float* out, Parallel);
};

}  // namespace shunted_attention
}  // namespace vsod
