// The register tile that all products of attention and of its layer are made of.  Like simd.h in
// the namespace of a SIMD level, and without the STL.
#pragma once

#include "../common/simd.h"

namespace vsod {
namespace VSOD_LEVEL {

// Elements are plain numbers.
template <class T>
struct PlainOp {
  using Number = T;                     // accumulators, scores, softmax
  using Element = T;                    // what the products read
  static constexpr int kDepthStep = 1;  // numbers along the depth in one element
  static constexpr int kExpDegree = 5;
  static VSOD_INLINE Vec<T> multiply_add(Vec<T> sum, Vec<T> a, Vec<T> b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
// Elements are two bfloat16 in one word.
struct PairOp {
  using Number = float;
  using Element = uint32_t;
  static constexpr int kDepthStep = 2;
  static constexpr int kExpDegree = 4;
  static VSOD_INLINE Vec<float> multiply_add(Vec<float> sum, Vec<uint32_t> a, Vec<uint32_t> b) {
    return Vec<float>(_mm512_dpbf16_ps(__m512(sum), __m512bh(a), __m512bh(b)));
  }
};
#endif

// sum[i][0..1] = A[i, :] @ B for kRows rows and kVectors vectors of columns:
// A[i, k] = a[i * kRowStep + k * kDepthStep], B[k, :] = b[k * b_stride ...].
// Then finish(i, sum[i][0], sum[i][1]) for each row; what is not computed is zero.
template <class Op, int kRows, int kVectors, int kRowStep, int kStep, class Finish>
VSOD_INLINE void tile_product(const typename Op::Element* a, const typename Op::Element* b,
                              int64_t b_stride, int64_t depth, Finish finish) {
  using Number = typename Op::Number;
  using Element = typename Op::Element;
  constexpr int kN = kLanes<Number>;
  Vec<Number> sum[kRows][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<Element> y[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) y[v] = load(b + v * kN);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec<Element> x = broadcast(a[i * kRowStep]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[i][v] = Op::multiply_add(sum[i][v], x, y[v]);
    }
    a += kStep;
    b += b_stride;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) finish(i, sum[i][0], sum[i][1]);
}

}  // namespace VSOD_LEVEL
}  // namespace vsod
