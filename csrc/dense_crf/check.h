// What all kernels of dense_crf rely on; dense_crf() in Python says the same with its own words.
#pragma once

#include <math.h>

#include <optional>

#include "../common/tensors.h"
#include "geometry.h"

namespace vsod {
namespace dense_crf {

struct Numbers {
  int64_t iterations;
  double gaussian_sxy, gaussian_weight, bilateral_sxy, bilateral_srgb, bilateral_weight;
};

// Whether the vertices of a lattice over an image's positions, and its colours if srgb is given,
// have 64-bit keys.
inline bool fits(int64_t height, int64_t width, double sxy, std::optional<double> srgb) {
  return srgb ? any_level::Geometry<5>(height, width, sxy, *srgb).fits
              : any_level::Geometry<2>(height, width, sxy, 0).fits;
}

constexpr int64_t kMostIterations = 1000, kMostPixels = int64_t(1) << 28;

inline void check(Device device, const Tensor& prob, const Tensor& image, const Numbers& n) {
  constexpr const char* kOp = "dense_crf";
  const Check check(kOp, device);
  const int64_t d = prob.dim();
  STD_TORCH_CHECK(d == 3 || (d == 4 && prob.size(1) >= 2), kOp,
                  ": prob must be (B, H, W) or (B, L, H, W) with L >= 2, got ",
                  text_of(sizes_of(prob)));
  check.fits("prob", prob, prob, ScalarType::Float, sizes_of(prob), Stride::kContiguous);
  check.first("image", image, 4);
  const ScalarType pixel =
      image.scalar_type() == ScalarType::Byte ? ScalarType::Byte : ScalarType::Float;
  check.fits("image", image, prob, pixel, {prob.size(0), 3, prob.size(d - 2), prob.size(d - 1)},
             Stride::kContiguous);
  const int64_t height = image.size(2), width = image.size(3);
  STD_TORCH_CHECK(height <= kMostPixels && width <= kMostPixels && height * width <= kMostPixels,
                  kOp, ": an image may have at most 2^28 pixels");
  STD_TORCH_CHECK(n.iterations >= 1 && n.iterations <= kMostIterations, kOp,
                  ": iterations must be from 1 to ", kMostIterations, ", got ", n.iterations);
  const auto number = [&](const char* name, double x, bool zero_too) {
    STD_TORCH_CHECK(
        isfinite(x) && (zero_too ? x >= 0 : x > 0), kOp, ": ", name,
        zero_too ? " must be finite and at least 0, got " : " must be finite and above 0, got ", x);
  };
  number("gaussian_sxy", n.gaussian_sxy, false);
  number("gaussian_weight", n.gaussian_weight, true);
  number("bilateral_sxy", n.bilateral_sxy, false);
  number("bilateral_srgb", n.bilateral_srgb, false);
  number("bilateral_weight", n.bilateral_weight, true);
  STD_TORCH_CHECK(n.gaussian_weight == 0 || fits(height, width, n.gaussian_sxy, {}), kOp,
                  ": gaussian_sxy = ", n.gaussian_sxy, " is too small for an image of this size");
  STD_TORCH_CHECK(n.bilateral_weight == 0 || fits(height, width, n.bilateral_sxy, n.bilateral_srgb),
                  kOp, ": bilateral_sxy = ", n.bilateral_sxy,
                  " with bilateral_srgb = ", n.bilateral_srgb,
                  " is too small for an image of this size");
}

}  // namespace dense_crf
}  // namespace vsod
