// Host side of the dense CRF on the CPU: checks, output, choice of the SIMD level.
// Schemas are in vsod_ops/dense_crf/schemas.inc, the kernel in cpu_kernel.cpp.

#include "cpu.h"

#include <algorithm>
#include <array>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "../common/levels.h"
#include "../common/parallel.h"
#include "../common/schemas.h"
#include "check.h"

namespace vsod {

VSOD_LEVEL_TABLES(const dense_crf::Kernel*, dense_crf_kernels)

namespace dense_crf {
namespace {

constexpr double kRounding = 1e-3;  // of the range: what resampling may reach beyond it

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

// A call that names no backend: looks at the values and converts, as op.py does for the others and
// with its words.

template <class... Parts>
std::string text_of(int precision, const Parts&... parts) {
  std::ostringstream text;
  text.precision(precision);
  (text << ... << parts);
  return text.str();
}

double number_in(const Tensor& x) {
  const Tensor wide = torch::stable::to(x, ScalarType::Double);
  return *static_cast<const double*>(wide.data_ptr());
}

std::pair<double, double> range_of(const Tensor& x) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x),
                                    torch::stable::detail::from(std::nullopt),
                                    torch::stable::detail::from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::aminmax", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor low = torch::stable::detail::to<Tensor>(stack[0]);
  const Tensor high = torch::stable::detail::to<Tensor>(stack[1]);
  return {number_in(low), number_in(high)};
}

// x in float32, contiguous and in 0..top, where it misses that by rounding at most.
Tensor clamped(const char* name, const Tensor& x, double top) {
  const auto [low, high] = range_of(x);
  const double slack = kRounding * top;
  if (!(low >= -slack && high <= top + slack)) {  // written so that NaN is caught
    const std::string range = isnan(low) ? "nan to nan" : text_of(9, low, " to ", high);
    throw std::runtime_error(
        text_of(9, name, " must lie in 0..", top, " without NaN, got ", range));
  }
  Tensor wide = as_contiguous(torch::stable::to(x, ScalarType::Float));
  if (low >= 0 && high <= top) return wide;
  if (wide.data_ptr() == x.data_ptr()) wide = torch::stable::clone(wide);
  float* values = static_cast<float*>(wide.data_ptr());
  std::transform(values, values + wide.numel(), values,
                 [&](float value) { return std::clamp(value, 0.f, float(top)); });
  return wide;
}

Tensor forward_unnamed(const Tensor& prob, const Tensor& image, int64_t iterations,
                       double gaussian_sxy, double gaussian_weight, double bilateral_sxy,
                       double bilateral_srgb, double bilateral_weight) {
  if (prob.numel() == 0)
    return Allocator("dense_crf", prob).empty(sizes_of(prob), ScalarType::Float);
  const Tensor values = clamped("prob", prob, 1);
  if (prob.dim() == 4) {
    const Tensor total = torch::stable::sum(values, std::vector<int64_t>{1});
    const auto [low, high] = range_of(total);
    const double error = std::max(1 - low, high - 1);
    // Classes rounded one by one to 16 bits miss one by more.
    const bool is_rounded =
        prob.scalar_type() == ScalarType::Half || prob.scalar_type() == ScalarType::BFloat16;
    if (error > (is_rounded ? 1e-2 : 1e-3))
      throw std::runtime_error(
          text_of(6, "prob must sum to one over the classes (dim 1), but is off by up to ", error));
  }
  Tensor colours = image;
  if (image.scalar_type() != ScalarType::Byte) {
    colours = clamped("image", image, 255);
    const double high = range_of(colours).second;
    if (is_floating(image) && 0 < high && high <= 1)
      aoti_torch_warn("dense_crf", __FILE__, __LINE__,
                      text_of(6, "dense_crf: image has values up to ", high,
                              ", but its scale is 0..255: in 0..1 all colours are nearly the "
                              "same to the CRF")
                          .c_str());
  }
  if (iterations == 0)
    return values.data_ptr() == prob.data_ptr() ? torch::stable::clone(values) : values;
  return forward(values, as_contiguous(colours), iterations, gaussian_sxy, gaussian_weight,
                 bilateral_sxy, bilateral_srgb, bilateral_weight, 0);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vsod_ops, m) {
  define_all(m,
#include "../../vsod_ops/dense_crf/schemas.inc"
  );
}

STABLE_TORCH_LIBRARY_IMPL(vsod_ops, CompositeExplicitAutograd, m) {
  m.impl("dense_crf_fits", TORCH_BOX(&fits));
}

STABLE_TORCH_LIBRARY_IMPL(vsod_ops, CPU, m) {
  m.impl("dense_crf_cpu", TORCH_BOX(&forward));
  if (level_is_known()) m.impl("dense_crf.unnamed", TORCH_BOX(&forward_unnamed));
}

}  // namespace dense_crf
}  // namespace vsod
