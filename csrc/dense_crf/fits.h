// For the Python face of both modules: dense_crf asks before it calls a kernel.
#pragma once

#include <optional>

#include "geometry.h"

namespace vsod {

// Whether the vertices of a lattice over an image's positions, and its colours if srgb is given,
// have 64-bit keys.
inline bool dense_crf_fits(int64_t height, int64_t width, double sxy, std::optional<double> srgb) {
  return srgb ? any_level::Geometry<5>(height, width, sxy, *srgb).fits
              : any_level::Geometry<2>(height, width, sxy, 0).fits;
}

#define VSOD_DENSE_CRF_FITS                                                                     \
  pybind11::arg("height"), pybind11::arg("width"), pybind11::arg("sxy"), pybind11::arg("srgb"), \
      "Whether dense_crf can filter an image of this size with these deviations;\n"             \
      "srgb None: positions alone"

}  // namespace vsod
