// What the host side of every op does with tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "kernel.h"

namespace vsod {

inline Dtype dtype_of(const char* op, const char* name, const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::Double: return kFloat64;
    case ScalarType::Half: return kFloat16;
    case ScalarType::BFloat16: return kBFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float32, float64, float16 or bfloat16");
  }
}

// What a kernel computes and keeps sums and states in beside tensors of x's dtype.
inline torch::headeronly::ScalarType compute_type(const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// What a kernel returned: 0, or the bytes that there was no memory for.
inline void check_memory(const char* op, int64_t missing) {
  STD_TORCH_CHECK(missing == 0, op, ": cannot allocate ", missing, " bytes of scratch memory");
}

}  // namespace vsod
