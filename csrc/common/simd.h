// Vectors of one SIMD level, written with the compiler's vector extension (GCC, Clang).
//
// A kernel file is compiled once per level, each time with other instruction-set flags and
// VSOD_LEVEL set to the level's name; everything here lives in that level's namespace, so that
// no code made for one level can be linked into another.  Include nothing here that has
// inline functions with external linkage (no STL): the linker would keep just one copy of them.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define VSOD_INLINE __attribute__((always_inline)) inline

namespace vsod {
namespace VSOD_LEVEL {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 14;  // 14 x 2 accumulators + 2 operands + 1 broadcast of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 6;  // 6 x 2 accumulators + 2 operands + 1 broadcast of 16 registers
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 6;
#endif

template <class T>
struct VectorOf {
  static constexpr int kLanes = kVectorBytes / int(sizeof(T));
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T loadable __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = VectorOf<T>::kLanes;

template <int... kIndex>
struct Indices {};
template <int kCount, int... kIndex>
struct MakeIndices : MakeIndices<kCount - 1, kCount - 1, kIndex...> {};
template <int... kIndex>
struct MakeIndices<0, kIndex...> {
  using type = Indices<kIndex...>;
};
template <int kCount>
using AllLanes = typename MakeIndices<kCount>::type;

template <class T>
VSOD_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::loadable*>(p);
}
template <class T>
VSOD_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T>::loadable*>(p) = v;
}
template <class T>
VSOD_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}
template <class T>
VSOD_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

VSOD_INLINE Vec<float> absolute(Vec<float> x) { return Vec<float>(Vec<int32_t>(x) & 0x7fffffff); }

// Lanes below `count` from v, the others `fill`.
VSOD_INLINE Vec<float> keep_first(Vec<float> v, int count, float fill) {
  Vec<int32_t> lane = {};
  for (int i = 0; i < kLanes<float>; ++i) lane[i] = i;
  return lane < count ? v : broadcast(fill);
}
VSOD_INLINE Vec<double> keep_first(Vec<double> v, int count, double fill) {
  Vec<int64_t> lane = {};
  for (int i = 0; i < kLanes<double>; ++i) lane[i] = i;
  return lane < int64_t(count) ? v : broadcast(fill);
}

template <class T>
VSOD_INLINE T horizontal_sum(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_reduce_add_ps(__m512(v));
#endif
  T sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += v[i];
  return sum;
}
template <class T>
VSOD_INLINE T horizontal_max(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_reduce_max_ps(__m512(v));
#endif
  T best = v[0];
  for (int i = 1; i < kLanes<T>; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// Lanes of a where (lane & kStep) == 0, else those of b, kStep lanes lower; and its mirror image.
template <class T, int kStep, int... kLane>
VSOD_INLINE void exchange(Vec<T>& a, Vec<T>& b, Indices<kLane...>) {
  constexpr int kN = sizeof...(kLane);
  const Vec<T> low = __builtin_shufflevector(a, b, (kLane & kStep ? kN + kLane - kStep : kLane)...);
  b = __builtin_shufflevector(a, b, (kLane & kStep ? kN + kLane : kLane + kStep)...);
  a = low;
}
template <class T, int kStep>
VSOD_INLINE void transpose_step(Vec<T>* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i)
    if (!(i & kStep)) exchange<T, kStep>(rows[i], rows[i + kStep], AllLanes<kLanes<T>>());
}
// Transposes a square of kLanes x kLanes in registers.
template <class T>
VSOD_INLINE void transpose_square(Vec<T>* rows) {
  transpose_step<T, 1>(rows);
  if constexpr (kLanes<T> > 2) transpose_step<T, 2>(rows);
  if constexpr (kLanes<T> > 4) transpose_step<T, 4>(rows);
  if constexpr (kLanes<T> > 8) transpose_step<T, 8>(rows);
}

// 2^x for x <= 0, NaN kept, 0 below -126.  2^x = 2^floor(x) * p(x - floor(x)), p a minimax
// polynomial on [0, 1] with p(0) = 1.  Relative error 1.7e-7 (degree 5), 3e-6 (degree 4, enough
// where the result is rounded to bfloat16).
template <int kDegree>
VSOD_INLINE Vec<float> exp2_polynomial(Vec<float> f) {
  static_assert(kDegree == 4 || kDegree == 5);
  Vec<float> p;
  if constexpr (kDegree == 5) {
    p = f * 1.8671307e-3f + 9.0170290e-3f;
    p = p * f + 5.5799914e-2f;
    p = p * f + 2.4016445e-1f;
    p = p * f + 6.9315131e-1f;
  } else {
    p = f * 1.3426690e-2f + 5.2242465e-2f;
    p = p * f + 2.4128021e-1f;
    p = p * f + 6.9304484e-1f;
  }
  return p * f + 1.0f;
}

template <int kDegree>
VSOD_INLINE Vec<float> exp2_nonpositive(Vec<float> x) {
#if defined(__AVX512F__)
  const __m512 fraction = _mm512_reduce_ps(__m512(x), _MM_FROUND_TO_NEG_INF);  // 0 for -inf
  return Vec<float>(_mm512_scalef_ps(__m512(exp2_polynomial<kDegree>(Vec<float>(fraction))),
                                     __m512(x)));  // scalef takes floor(x)
#else
  const Vec<float> clamped = x < -126.0f ? broadcast(-126.0f) : x;  // keeps NaN
  const Vec<int32_t> floor = __builtin_convertvector(clamped, Vec<int32_t>) - 1;
  const Vec<float> fraction = clamped - __builtin_convertvector(floor, Vec<float>);  // (0, 1]
  const Vec<int32_t> bits = (floor + 127) << 23;  // zero at x <= -126
  return exp2_polynomial<kDegree>(fraction) * Vec<float>(bits);
#endif
}

template <int kDegree>
VSOD_INLINE Vec<double> exp2_nonpositive(Vec<double> x) {
  Vec<double> y = {};
  for (int i = 0; i < kLanes<double>; ++i) y[i] = ::exp2(x[i]);
  return y;
}

// Storage types: 16-bit floats are kept as their bits.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

VSOD_INLINE float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
VSOD_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

VSOD_INLINE float widen(float x) { return x; }
VSOD_INLINE double widen(double x) { return x; }
VSOD_INLINE float widen(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
VSOD_INLINE float widen(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  // Shift into place and multiply by 2^112: exact, and right for subnormals.
  float y = bits_to_float(magnitude << 13) * 0x1p112f;
  if (magnitude >= 0x7c00) y = bits_to_float((magnitude << 13) | 0x7f800000);  // inf, NaN
  return bits_to_float(float_to_bits(y) | sign);
}

template <class Storage>
struct Narrow;
template <>
struct Narrow<float> {
  static VSOD_INLINE float from(float x) { return x; }
};
template <>
struct Narrow<double> {
  static VSOD_INLINE double from(double x) { return x; }
};
template <>
struct Narrow<BFloat16> {
  static VSOD_INLINE BFloat16 from(float x) {
    const uint32_t bits = float_to_bits(x);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties even
    return {uint16_t(x != x ? 0x7fc0 : rounded)};
  }
};
template <>
struct Narrow<Float16> {
  static VSOD_INLINE Float16 from(float x) {
    const uint32_t bits = float_to_bits(x);
    const uint32_t sign = (bits >> 16) & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude >= 0x7f800000) {
      half = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    } else if (magnitude >= 0x477ff000) {  // rounds to 65536 or more
      half = 0x7c00;
    } else if (magnitude < 0x38800000) {  // subnormal: the float addition does the rounding
      half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
    } else {
      half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    }
    return {uint16_t(half | sign)};
  }
};

}  // namespace VSOD_LEVEL
}  // namespace vsod
