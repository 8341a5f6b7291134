// Host side of the dense CRF on the CPU: checks, output, choice of the SIMD level.
// Schemas are in vsod_ops/dense_crf/op.py, the kernel in cpu_kernel.cpp.

#include "cpu.h"

#include "../common/levels.h"
#include "../common/parallel.h"
#include "check.h"

namespace vsod {

VSOD_LEVEL_TABLES(const dense_crf::Kernel*, dense_crf_kernels)

namespace dense_crf {
namespace {

Tensor forward(const Tensor& prob, const Tensor& image, int64_t iterations, double gaussian_sxy,
               double gaussian_weight, double bilateral_sxy, double bilateral_srgb,
               double bilateral_weight, int64_t hash_capacity) {
  check(
      Device::kCpu, prob, image,
      {iterations, gaussian_sxy, gaussian_weight, bilateral_sxy, bilateral_srgb, bilateral_weight});
  STD_TORCH_CHECK(hash_capacity >= 0 && hash_capacity <= kMostPixels,
                  "dense_crf: hash_capacity must be 0 to 2^28, got ", hash_capacity);
  Tensor out = Allocator("dense_crf", prob).empty_like(prob);
  if (prob.numel() == 0) return out;
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
  check_memory("dense_crf", dense_crf_kernels(0)->forward(problem, on_each_thread));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vsod_ops, CPU, m) { m.impl("dense_crf_cpu", TORCH_BOX(&forward)); }

}  // namespace dense_crf
}  // namespace vsod
