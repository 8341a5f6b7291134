// Host side of the dense CRF on the CPU: checks, output, choice of the SIMD level.
// Schemas are in vsod_ops/dense_crf/op.py, the kernel in cpu_kernel.cpp.

#include "cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "../common/levels.h"
#include "../common/parallel.h"
#include "../common/tensors.h"
#include "geometry.h"

namespace vsod {

VSOD_LEVEL_TABLES(const dense_crf::Kernel*, dense_crf_kernels)

namespace dense_crf {
namespace {

using any_level::Geometry;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What the kernel relies on; dense_crf() in Python says the same with argument names.
void check(const Tensor& prob, const Tensor& image) {
  STD_TORCH_CHECK(prob.is_cpu() && image.is_cpu() && prob.is_contiguous() && image.is_contiguous(),
                  "dense_crf: prob and image must be contiguous CPU tensors");
  STD_TORCH_CHECK(
      prob.scalar_type() == ScalarType::Float &&
          (image.scalar_type() == ScalarType::Byte || image.scalar_type() == ScalarType::Float),
      "dense_crf: prob must be float32, image uint8 or float32");
  const int64_t d = prob.dim();
  STD_TORCH_CHECK((d == 3 || (d == 4 && prob.size(1) >= 2)) && image.dim() == 4 &&
                      image.size(0) == prob.size(0) && image.size(1) == 3 &&
                      image.size(2) == prob.size(d - 2) && image.size(3) == prob.size(d - 1),
                  "dense_crf: shapes of prob and image do not fit");
}

Tensor forward(const Tensor& prob, const Tensor& image, int64_t iterations, double gaussian_sxy,
               double gaussian_weight, double bilateral_sxy, double bilateral_srgb,
               double bilateral_weight, int64_t hash_capacity) {
  check(prob, image);
  STD_TORCH_CHECK(iterations >= 1 && iterations <= 1000,
                  "dense_crf: iterations must be from 1 to 1000, got ", iterations);
  STD_TORCH_CHECK(image.size(2) * image.size(3) <= (int64_t(1) << 28),
                  "dense_crf: an image may have at most 2^28 pixels");
  Tensor out = torch::stable::empty_like(prob);
  Problem problem{};
  problem.batch = prob.size(0), problem.classes = prob.dim() == 4 ? prob.size(1) : 0;
  problem.height = image.size(2), problem.width = image.size(3);
  problem.prob = static_cast<const float*>(prob.data_ptr());
  problem.image = image.data_ptr();
  problem.image_is_float = image.scalar_type() == ScalarType::Float;
  problem.out = static_cast<float*>(out.data_ptr());
  problem.iterations = iterations;
  problem.gaussian_sxy = float(gaussian_sxy), problem.gaussian_weight = float(gaussian_weight);
  problem.bilateral_sxy = float(bilateral_sxy), problem.bilateral_srgb = float(bilateral_srgb);
  problem.bilateral_weight = float(bilateral_weight);
  problem.hash_capacity = hash_capacity;
  problem.threads = torch::stable::get_num_threads();
  STD_TORCH_CHECK(problem.gaussian_weight <= 0 ||
                      Geometry<2>(problem.height, problem.width, gaussian_sxy, 0).fits,
                  "dense_crf: gaussian_sxy = ", gaussian_sxy,
                  " is too small for an image of this size");
  STD_TORCH_CHECK(
      problem.bilateral_weight <= 0 ||
          Geometry<5>(problem.height, problem.width, bilateral_sxy, bilateral_srgb).fits,
      "dense_crf: bilateral_sxy = ", bilateral_sxy, " with bilateral_srgb = ", bilateral_srgb,
      " is too small for an image of this size");
  check_memory("dense_crf", dense_crf_kernels(0)->forward(problem, on_each_thread));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vsod_ops, CPU, m) { m.impl("dense_crf_cpu", TORCH_BOX(&forward)); }

}  // namespace dense_crf
}  // namespace vsod
