// How vertices of the lattice become 64-bit keys.  On the CPU and on the GPU alike.
#pragma once

#include <math.h>
#include <stdint.h>

// Code for one SIMD level keeps its own copy, so that no other code calls it by way of the linker.
#if !defined(VSOD_LEVEL)
#define VSOD_LEVEL any_level
#endif

namespace vsod {
namespace VSOD_LEVEL {

// Vertices have integer coordinates c_0..c_D that sum to zero and are equal modulo D + 1.  The
// integers c_1 and (c_i - c_1) / (D + 1), i >= 2, say which vertex it is; the key holds them side
// by side, each less its lowest value.
template <int D>
struct Geometry {
  float scale[D];       // of feature i, from its unit to the lattice's
  int64_t step[D + 1];  // key of the next vertex along direction i, less the key
  int64_t origin;       // key of the vertex whose integers are all zero
  int shift[D];
  int bits;  // of a key
  bool fits;

  // Features: x and y of an image's pixels, with standard deviation sxy, and (D = 5) three colours
  // in 0..255, with srgb.
  Geometry(int64_t height, int64_t width, double sxy, double srgb) {
    double extent[D + 1] = {};  // extent[i]: of feature i (from 1) on the lattice
    const double deviation = sqrt(2.0 / 3.0) * (D + 1);
    bool small_enough = true;
    for (int i = 0; i < D; ++i) {
      const double most = i == 0 ? double(width - 1) : i == 1 ? double(height - 1) : 255;
      const double unit = i < 2 ? sxy : srgb;
      const double per_deviation = deviation / sqrt((i + 1.0) * (i + 2.0));
      scale[i] = float(per_deviation / unit);
      extent[i + 1] = per_deviation * (most / unit);
      // Coordinates must leave float32 some digits for the weights.
      small_enough = small_enough && extent[i + 1] * (D + 2) < double(1 << 19);
    }
    bits = 0, origin = 0;
    for (int field = 0; field < D && small_enough; ++field) {
      // c_1 = extent_2 + .. + extent_D - extent_1 at most and least; likewise the others.
      double low = 0, high = 0;
      const int i = field + 1;
      if (field == 0) {
        low = -extent[1];
        for (int m = 2; m <= D; ++m) high += extent[m];
      } else {
        high = extent[1];
        for (int m = 2; m < i; ++m) low -= extent[m];
        low -= (i + 1) * extent[i];
        low /= D + 1, high /= D + 1;
      }
      const int64_t margin = field == 0 ? 4 * (D + 1) : 8;  // vertices around, their neighbours
      const int64_t lowest = int64_t(floor(low)) - margin;
      const int64_t values = int64_t(ceil(high)) + margin - lowest + 1;
      shift[field] = bits;
      origin -= bits < 63 ? lowest * (int64_t(1) << bits) : 0;
      while ((int64_t(1) << bits >> shift[field]) < values && bits < 63) ++bits;
    }
    fits = small_enough && bits < 63;
    if (!fits) return;
    for (int j = 0; j <= D; ++j) {  // all coordinates + 1, but c_j - D
      step[j] = j == 1 ? -D : 1;
      for (int i = 2; i <= D; ++i)
        step[j] += (j == 1 ? 1 : i == j ? -1 : 0) * (int64_t(1) << shift[i - 1]);
    }
  }
};

}  // namespace VSOD_LEVEL
}  // namespace vsod
