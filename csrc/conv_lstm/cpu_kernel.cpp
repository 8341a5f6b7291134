// ConvLSTM on a CPU, forward and backward, for one SIMD level.
//
// What.  Each step is one 'same' convolution of the C + M planes of x and h to 4M gates, the gate
// arithmetic, and (backward) its gradients.  Few channels at high resolution and many channels at
// low resolution run the same code: vectors lie along the width, so no channel count wastes lanes.
//
// How.  A task is a tile of one image.  The planes that it reads are copied into scratch that
// stays in the L2 cache, with a border of zeros, in the compute type, x and h one after another:
// so every tap is a fixed offset, edges need no code, and any strides and dtypes are read once.
//     convolution  conv_block: 4 outputs x up to kMaxVectors vectors of pixels in registers,
//                  over all planes and taps.  Forward, the 4 outputs are i, f, g, o of one
//                  channel, so the gate arithmetic follows at once and gates reach memory only
//                  where the backward wants them.
//     3 x 3        Winograd's F(2, 3) along the height (Layout): a third fewer products, for the
//                  convolutions and for the weight gradients.  Along the width lie the lanes.
//                  Where x, h or a weight is beyond kMostSummed, its sums of rows could overflow
//                  or cancel infinities: then all is done again without it.
//     bfloat16     with vdpbf16ps the forward runs the same code on pairs of planes, without
//                  Winograd (PairOp).
//     backward     step t, from the last, one pass.  A task is a strip of rows, taken in bands.
//                  The gate gradients of a band, and of the rows around it that the kernel
//                  reaches, are made from the saved state into a window in scratch, out of which
//                  come dh_{t-1}, dx_t and the weight gradients.  So from step to step only the
//                  images dh and dc pass, and no gate gradient reaches memory; the price is that
//                  those of the rows between two strips are made twice.
//     weights      dW[g, plane, tap] = sum over pixels of dgates[g] * plane shifted by the tap:
//                  weight_block, rows are planes (broadcast), lanes are gates, the depth is the
//                  pixels of the band, whose gate gradients are transposed for it.
// Strips are dealt to a fixed number of groups; each sums its own dW in order, and the groups are
// added in order, so the bits do not depend on the threads.
//
// Narrow images with many channels, whose rows would leave lanes empty, are convolved by the
// library (cpu_library.h); the gates and their gradients are made here, over whole images as rows
// (Gates).

#include "cpu.h"

#include "../common/scratch.h"
#include "../common/simd.h"

namespace vsod {
namespace VSOD_LEVEL {

using namespace conv_lstm;

namespace {

#if defined(__AVX512F__)
constexpr int kMaxVectors = 6;  // 4 x 6 sums + 6 operands + 1 broadcast of 32 registers
#else
constexpr int kMaxVectors = 3;  // 4 x 3 sums + 3 operands + 1 broadcast of 16 registers
#endif
constexpr int kOutputs = 4;
constexpr int kWeightRows = 8;              // planes in one weight_block
constexpr int64_t kTileBytes = 448 * 1024;  // scratch of one task: fits a 1 MB L2 with its streams
constexpr int64_t kDepthPixels = 256;       // pixels of one weight_block: its operands fit L1
constexpr int64_t kSumBytes = 8 << 20;      // of all groups together
constexpr int64_t kMostGroups = 64, kFewestGroups = 4;
constexpr int64_t kMostBand = 4;  // times the rows that are made together
constexpr int64_t kStripRows = 16, kRecomputedStripRows = 32;

// ------------------------------------------------------------------ loads and stores

template <class N>
constexpr bool kIsHalf = false;
template <>
constexpr bool kIsHalf<Float16> = true;

template <class S, class N>
VSOD_INLINE Vec<S> load_wide(const N* p) {
  if constexpr (sizeof(N) == sizeof(S)) {
    return load(p);
  } else {
#if defined(__AVX512F__)
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (kIsHalf<N>) return Vec<float>(_mm512_cvtph_ps(bits));
    return Vec<float>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
#else
    Vec<S> v = {};
    for (int i = 0; i < kLanes<S>; ++i) v[i] = widen(p[i]);
    return v;
#endif
  }
}

// The first `count` numbers, the other lanes zero.
template <class S, class N>
VSOD_INLINE Vec<S> load_first(const N* p, int64_t count) {
  if (__builtin_expect(count >= kLanes<S>, 1)) return load_wide<S>(p);
  Vec<S> v = {};
  for (int i = 0; i < count; ++i) v[i] = widen(p[i]);
  return v;
}

template <class S, class N>
VSOD_INLINE void store_first(N* p, Vec<S> v, int64_t count) {
  if constexpr (sizeof(N) == sizeof(S)) {
    if (__builtin_expect(count >= kLanes<S>, 1)) return store(p, v);
  } else {
#if defined(__AVX512F__)
    if (__builtin_expect(count >= kLanes<S>, 1)) {
      __m256i bits;
      if constexpr (kIsHalf<N>) {
        bits = _mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT);
      } else {
        const Vec<uint32_t> x = Vec<uint32_t>(v);
        const Vec<uint32_t> rounded = (x + 0x7fff + ((x >> 16) & 1)) >> 16;
        const Vec<uint32_t> nan = rounded - rounded + 0x7fc0;
        bits = _mm512_cvtepi32_epi16(__m512i(v == v ? rounded : nan));
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
      return;
    }
#endif
  }
  for (int i = 0; i < count && i < kLanes<S>; ++i) p[i] = Narrow<N>::from(v[i]);
}

// ------------------------------------------------------------------ arithmetic of one element

// What the convolutions read: numbers in the compute type S.
template <class T>
struct PlainOp {
  using S = T;
  using Element = T;
  static constexpr int kPlanes = 1;  // in one element
  static constexpr bool kWinograd = true;
  static VSOD_INLINE Vec<T> multiply_add(Vec<T> sum, Vec<T> a, Vec<T> b) { return sum + a * b; }
  static VSOD_INLINE T element(T first, T) { return first; }
  template <class N>
  static VSOD_INLINE Vec<T> load_elements(const N* first, const N*) {
    return load_wide<T>(first);
  }
};

#if defined(__AVX512BF16__)
// Two bfloat16 in one word: the same pixel, or weight, of two neighbouring planes.  Their products
// are exact and summed in float32.
struct PairOp {
  using S = float;
  using Element = uint32_t;
  static constexpr int kPlanes = 2;
  static constexpr bool kWinograd = false;  // its sums would be rounded to bfloat16
  static VSOD_INLINE Vec<float> multiply_add(Vec<float> sum, Vec<uint32_t> a, Vec<uint32_t> b) {
    return Vec<float>(_mm512_dpbf16_ps(__m512(sum), __m512bh(a), __m512bh(b)));
  }
  static VSOD_INLINE uint32_t element(float first, float second) {  // both are bfloat16
    return float_to_bits(first) >> 16 | (float_to_bits(second) & 0xffff0000);
  }
  static VSOD_INLINE Vec<uint32_t> load_elements(const BFloat16* first, const BFloat16* second) {
    const Vec<uint32_t> low = words(first);
    return second ? low | words(second) << 16 : low;
  }
  static VSOD_INLINE Vec<uint32_t> words(const BFloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return Vec<uint32_t>(_mm512_cvtepu16_epi32(bits));
  }
};
#endif

// ------------------------------------------------------------------ sigmoid and tanh

// exp(x) = scale * (1 + part), x <= 0, part = e^r - 1 with |r| <= ln 2 / 2.  NaN is kept; the
// scale is 0 below -87.7, where exp(x) is not a normal number.
struct ExpParts {
  Vec<float> scale, part;
};
VSOD_INLINE ExpParts exp_parts(Vec<float> x) {
  x = x < -88.0f ? broadcast(-88.0f) : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> shifted = x * 1.44269504f + magic;
  const Vec<float> n = shifted - magic;
  Vec<float> r = x - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  Vec<float> p = r * 1.9841270e-4f + 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666668e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * (r * r) + r;
  const Vec<int32_t> exponent = (Vec<int32_t>(shifted) << 23) + 0x3f800000;
  return {Vec<float>(exponent), p};
}

// A value as a quotient, not divided yet: products of quotients need one division.
template <class S>
struct Quotient {
  Vec<S> over, under;
  VSOD_INLINE Vec<S> value() const { return over / under; }
};

VSOD_INLINE Quotient<float> sigmoid(Vec<float> x) {
  const ExpParts e = exp_parts(-absolute(x));
  const Vec<float> power = e.scale * e.part + e.scale;
  return {x < 0.0f ? power : broadcast(1.0f), 1.0f + power};
}

VSOD_INLINE Quotient<float> tanh_of(Vec<float> x) {
  // -expm1(-2|x|) / (2 + expm1(-2|x|)) with the sign of x: exact near zero.
  const ExpParts e = exp_parts(absolute(x) * -2.0f);
  const Vec<float> expm1 = e.scale * e.part + (e.scale - 1.0f);
  const Vec<int32_t> sign = Vec<int32_t>(x) & int32_t(0x80000000);
  return {Vec<float>(Vec<int32_t>(-expm1) | sign), 2.0f + expm1};
}

VSOD_INLINE Quotient<double> sigmoid(Vec<double> x) {
  Vec<double> y = {};
  for (int i = 0; i < kLanes<double>; ++i) y[i] = 1 / (1 + ::exp(-x[i]));
  return {y, broadcast(1.0)};
}
VSOD_INLINE Quotient<double> tanh_of(Vec<double> x) {
  Vec<double> y = {};
  for (int i = 0; i < kLanes<double>; ++i) y[i] = ::tanh(x[i]);
  return {y, broadcast(1.0)};
}

// ------------------------------------------------------------------ register tiles

// sums[j][v] = sum over planes and taps of weights[plane][tap][j] * in[plane][offset of tap + v]
// for kOutputs outputs and V vectors of pixels.
template <class Op, int V>
void conv_block(const typename Op::Element* in, int64_t plane_stride, int64_t planes,
                const int64_t* offsets, int64_t taps, const typename Op::Element* weights,
                typename Op::S* sums) {
  using S = typename Op::S;
  using Element = typename Op::Element;
  constexpr int kN = kLanes<S>;
  Vec<S> sum[kOutputs][V] = {};
  for (int64_t plane = 0; plane < planes; ++plane) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      const Element* at = in + offsets[tap];
      Vec<Element> x[V];
#pragma GCC unroll 6
      for (int v = 0; v < V; ++v) x[v] = load(at + v * kN);
#pragma GCC unroll 4
      for (int j = 0; j < kOutputs; ++j) {
        const Vec<Element> w = broadcast(weights[j]);
#pragma GCC unroll 6
        for (int v = 0; v < V; ++v) sum[j][v] = Op::multiply_add(sum[j][v], w, x[v]);
      }
      weights += kOutputs;
    }
    in += plane_stride;
  }
#pragma GCC unroll 4
  for (int j = 0; j < kOutputs; ++j)
#pragma GCC unroll 6
    for (int v = 0; v < V; ++v) store(sums + (j * kMaxVectors + v) * kN, sum[j][v]);
}

template <class Op>
VSOD_INLINE void conv(int vectors, const typename Op::Element* in, int64_t plane_stride,
                      int64_t planes, const int64_t* offsets, int64_t taps,
                      const typename Op::Element* weights, typename Op::S* sums) {
  switch (vectors) {
    case 1: return conv_block<Op, 1>(in, plane_stride, planes, offsets, taps, weights, sums);
    case 2: return conv_block<Op, 2>(in, plane_stride, planes, offsets, taps, weights, sums);
    case 3: return conv_block<Op, 3>(in, plane_stride, planes, offsets, taps, weights, sums);
#if defined(__AVX512F__)
    case 4: return conv_block<Op, 4>(in, plane_stride, planes, offsets, taps, weights, sums);
    case 5: return conv_block<Op, 5>(in, plane_stride, planes, offsets, taps, weights, sums);
    case 6: return conv_block<Op, 6>(in, plane_stride, planes, offsets, taps, weights, sums);
#endif
  }
}

// A rectangle of pixels as the depth of weight_block.
struct Depth {
  int64_t rows, columns;
  int64_t a_row, b_row;  // from the end of a row to the start of the next, in elements
};

// sums[i][v] += sum over pixels of a[i * a_stride + pixel] * b[pixel][v], R planes, V vectors.
// The pixels are summed apart, from zero: many short sums lose less than a long one.
template <class S, int R, int V>
void weight_block(const S* a, int64_t a_stride, const S* b, int64_t b_stride, Depth depth, S* sums,
                  int64_t sum_stride) {
  constexpr int kN = kLanes<S>;
  Vec<S> sum[R][V];
  const S* plane[R];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    plane[i] = a + i * a_stride;
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[i][v] = Vec<S>{};
  }
  int64_t at = 0;
  for (int64_t row = 0; row < depth.rows; ++row) {
    for (int64_t column = 0; column < depth.columns; ++column) {
      Vec<S> y[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) y[v] = load(b + v * kN);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const Vec<S> x = broadcast(plane[i][at]);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum[i][v] += x * y[v];
      }
      b += b_stride;
      ++at;
    }
    at += depth.a_row;
    b += depth.b_row;
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      S* to = sums + i * sum_stride + v * kN;
      store(to, load(to) + sum[i][v]);
    }
}

template <class S, int V>
VSOD_INLINE void weight_rows(int64_t rows, const S* a, int64_t a_stride, const S* b,
                             int64_t b_stride, Depth depth, S* sums, int64_t sum_stride) {
  const auto run = [&](auto block) __attribute__((always_inline)) {
    block(a, a_stride, b, b_stride, depth, sums, sum_stride);
  };
  switch (rows) {
    case 1: return run(weight_block<S, 1, V>);
    case 2: return run(weight_block<S, 2, V>);
    case 3: return run(weight_block<S, 3, V>);
    case 4: return run(weight_block<S, 4, V>);
    case 5: return run(weight_block<S, 5, V>);
    case 6: return run(weight_block<S, 6, V>);
    case 7: return run(weight_block<S, 7, V>);
    default: return run(weight_block<S, 8, V>);
  }
}

// ------------------------------------------------------------------ tiles and packed planes

struct Tile {
  int64_t b, y, x, rows, columns;  // y may be negative: rows outside of the image are zeros
};

// The largest number that Winograd's form takes: products of two of them have room to be summed.
// NaN reaches what it reaches without it: the rows of a unit share all the input rows but the first
// and the last, and each of those two goes into one part, of one row.
template <class S>
constexpr S kMostSummed = sizeof(S) == 4 ? S(1e18) : S(1e150);

// Packed planes and the convolutions over them.  Taps that are outside of the image wherever the
// kernel lies are left out: kernel_y rows and kernel_x columns of it remain.
//
// Paired (3 x 3): output rows y and y + dilation are made together out of input rows
// d0 .. d3 = y - dilation .. y + 2 dilation, by Winograd's F(2, 3) along the height:
//     part          0         1                   2                   3
//     of the input  d0 - d2   d1 + d2             d2 - d1             d3 - d1
//     of the kernel g0        (g0 + g1 + g2) / 2  (g0 - g1 + g2) / 2  g2
//     first row = part 0 + 1 + 2, second row = part 1 - 2 + 3
// Each part is a convolution with the 3 taps of one row: 12 products for 2 pixels, not 18.
// Otherwise: one part, the input itself, with all taps, and one output row at a time.
template <class Op>
struct Layout {
  using S = typename Op::S;
  using Element = typename Op::Element;
  static constexpr int kN = kLanes<S>;
  int64_t kernel, dilation;
  int64_t half_y, half_x;      // of the kernel, in taps
  int64_t reach_y, reach_x;    // the same in pixels
  int64_t kernel_y, kernel_x;  // taps
  int64_t margin;              // of the first pixel in a packed row
  int64_t pitch;  // of a packed row, which is [reach_x, pitch + reach_x): its right border lies
                  // where the left margin of the next row begins
  bool paired;
  int64_t parts, taps;  // taps of each part
  int64_t unit_rows;    // output rows that are made together

  Layout(const Problem& p, int64_t columns)
      : kernel(p.kernel), dilation(p.dilation),
        half_y(smaller(p.kernel / 2, (p.height - 1) / p.dilation)),
        half_x(smaller(p.kernel / 2, (p.width - 1) / p.dilation)), reach_y(half_y * dilation),
        reach_x(half_x * dilation), kernel_y(2 * half_y + 1), kernel_x(2 * half_x + 1),
        margin(round_up(2 * reach_x, kN)), pitch(margin + round_up(columns, kN)),
        paired(Op::kWinograd && p.kernel == 3 && half_y == 1 && 2 * dilation <= p.height &&
               !p.direct),
        parts(paired ? 4 : 1), taps(paired ? kernel_x : kernel_y * kernel_x),
        unit_rows(paired ? 2 : 1) {}

  // Of the taps, from a pixel of a packed plane.
  void write_offsets(int64_t* to) const {
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t down = paired ? 0 : tap / kernel_x - half_y;
      to[tap] = dilation * (down * pitch + tap % kernel_x - half_x);
    }
  }
  // The place of a tap in the kernel as it is stored.
  int64_t stored(int64_t row, int64_t column) const {
    const int64_t middle = kernel / 2;
    return (row + middle - half_y) * kernel + column + middle - half_x;
  }

  // Tiles are made of so many rows.
  int64_t row_step() const { return paired ? 2 * dilation : 1; }
  int64_t units(int64_t rows) const { return round_up(rows, row_step()) / unit_rows; }
  int64_t row(int64_t unit, int64_t r) const {  // row r of a unit, in the tile
    return paired ? unit / dilation * 2 * dilation + unit % dilation + r * dilation : unit;
  }

  // Elements of a plane with its border, and of its parts.  Not a power of two: planes would share
  // one cache set.
  int64_t plain_plane(int64_t rows) const {
    return round_up((round_up(rows, row_step()) + 2 * reach_y) * pitch + margin, 2 * kN) + kN;
  }
  int64_t plane(int64_t rows) const {
    return paired ? round_up(units(rows) * parts * pitch + margin, 2 * kN) + kN : plain_plane(rows);
  }
  // Where a part of a unit begins in a packed plane, at the first pixel.
  int64_t at(int64_t unit, int64_t part) const {
    return (paired ? unit * parts + part : unit + reach_y) * pitch + margin;
  }
  int64_t unit_stride() const { return parts * pitch; }

  // The parts of one plane with a border.  With kCheck returns whether its numbers fit them.
  template <bool kCheck>
  bool split(const S* plain, int64_t rows, S* parts_of) const {
    auto beyond = Vec<S>{} > kMostSummed<S>;
    bool border_beyond = false;
    for (int64_t unit = 0; unit < units(rows); ++unit) {
      const S* d = plain + row(unit, 0) * pitch;
      S* to = parts_of + unit * parts * pitch;
      for (int64_t x = margin; x < pitch; x += kN) split_at<kCheck, Vec<S>>(d + x, to + x, &beyond);
      for (int64_t x = 0; x < reach_x; ++x) {
        split_at<kCheck, S>(d + margin - reach_x + x, to + margin - reach_x + x, &border_beyond);
        split_at<kCheck, S>(d + pitch + x, to + pitch + x, &border_beyond);
      }
    }
    for (int i = 0; i < kN; ++i) border_beyond |= beyond[i] != 0;
    return !border_beyond;
  }
  // A vector or a number.
  template <bool kCheck, class V, class Mask>
  VSOD_INLINE void split_at(const S* from, S* to, Mask* beyond) const {
    V d[4];
    for (int i = 0; i < 4; ++i) {
      memcpy(&d[i], from + i * dilation * pitch, sizeof(V));
      if (kCheck) *beyond |= (d[i] > kMostSummed<S>) | (d[i] < -kMostSummed<S>);
    }
    const V split[4] = {d[0] - d[2], d[1] + d[2], d[2] - d[1], d[3] - d[1]};
    for (int i = 0; i < 4; ++i) memcpy(to + i * pitch, &split[i], sizeof(V));
  }

  // The weight of a part's tap, made of the weights weight(i) of the kernel as it is stored.
  template <class Weight>
  S part_weight(int64_t part, int64_t tap, const Weight& weight) const {
    if (!paired) return weight(stored(tap / kernel_x, tap % kernel_x));
    const S top = weight(stored(0, tap)), middle = weight(stored(1, tap));
    const S bottom = weight(stored(2, tap));
    switch (part) {
      case 0: return top;
      case 1: return (top + middle + bottom) / 2;
      case 2: return (top - middle + bottom) / 2;
      default: return bottom;
    }
  }

  // sums[row of the unit][output][vector]: in points to the first pixel of the unit's part 0, the
  // weights are [part][all_planes][tap][kOutputs], of which the first `planes` are used.
  // Room for `parts` rows.
  VSOD_INLINE void convolve(int vectors, const Element* in, int64_t plane_stride, int64_t planes,
                            int64_t all_planes, const int64_t* offsets, const Element* weights,
                            S* sums) const {
    constexpr int64_t kRow = kOutputs * kMaxVectors * kN;
    for (int64_t part = 0; part < parts; ++part)
      conv<Op>(vectors, in + part * pitch, plane_stride, planes, offsets, taps,
               weights + part * all_planes * taps * kOutputs, sums + part * kRow);
    if (!paired) return;
    for (int j = 0; j < kOutputs; ++j)
      for (int v = 0; v < vectors; ++v) {
        S* at = sums + (j * kMaxVectors + v) * kN;
        const Vec<S> one = load(at + kRow), two = load(at + 2 * kRow);
        store(at, load(at) + (one + two));
        store(at + kRow, one - two + load(at + 3 * kRow));
      }
  }
  static constexpr int64_t kSums = 4 * kOutputs * kMaxVectors * kN;
};

// The cut of an image into tiles.
struct Tiling {
  int64_t rows, columns;  // of a tile
  int64_t down, across;   // tiles in an image

  int64_t tiles(const Problem& p) const { return p.batch * down * across; }

  // Images of a batch are neighbours, so that one group can own a pixel of all of them.
  Tile tile(const Problem& p, int64_t index) const {
    const int64_t b = index % p.batch, place = index / p.batch;
    const int64_t y = place / across * rows, x = place % across * columns;
    return {b, y, x, smaller(rows, p.height - y), smaller(columns, p.width - x)};
  }
};

// Columns of a tile where an image is cut into `across` of them.
template <class S>
int64_t columns_of(const Problem& p, int64_t across) {
  return across == 1 ? p.width : round_up(ceil_div(p.width, across), kLanes<S>);
}

// Vectors of a tile's row, cut into blocks of nearly equal width.
struct Blocks {
  int64_t vectors, count;
  explicit Blocks(int64_t all) : vectors(all), count(ceil_div(all, kMaxVectors)) {}
  int64_t first(int64_t i) const { return i * vectors / count; }
};

// Copies one plane of a tile with its border; what lies outside of the image is zero.  second: the
// other plane of a pair, null: zeros.
template <class Op, class N>
void pack_plane(const Problem& p, const Layout<Op>& layout, const Tile& tile, const N* src,
                const N* second, int64_t stride_y, int64_t stride_x, typename Op::Element* dst) {
  using Element = typename Op::Element;
  const int64_t reach = layout.reach_x;
  const int64_t left = larger(tile.x - reach, 0);
  const int64_t right = smaller(tile.x + tile.columns + reach, p.width);
  const int64_t before = layout.margin - reach - (tile.x - left);
  const int64_t end = tile.y + round_up(tile.rows, layout.row_step()) + layout.reach_y;
  dst += reach;
  constexpr int kN = kLanes<Element>;
  for (int64_t y = tile.y - layout.reach_y; y < end; ++y, dst += layout.pitch) {
    if (y < 0 || y >= p.height) {
      memset(dst, 0, layout.pitch * sizeof(Element));
      continue;
    }
    const int64_t start = y * stride_y + left * stride_x;
    const N *row = src + start, *other = second ? second + start : nullptr;
    for (int64_t x = 0; x < before; ++x) dst[x] = 0;
    Element* to = dst + before;
    const int64_t count = right - left;
    int64_t x = 0;
    if (stride_x == 1) {
      if constexpr (sizeof(N) == sizeof(Element)) {
        memcpy(to, row, count * sizeof(Element));
        x = count;
      } else {
        for (; x + kN <= count; x += kN)
          store(to + x, Op::load_elements(row + x, other ? other + x : nullptr));
      }
    }
    for (; x < count; ++x)
      to[x] = Op::element(widen(row[x * stride_x]), other ? widen(other[x * stride_x]) : 0);
    for (x = before + count; x < layout.pitch; ++x) dst[x] = 0;
  }
}

// ------------------------------------------------------------------ what both directions share

// Of so many planes; x and h are paired apart.
template <class Op>
int64_t elements(int64_t planes) {
  return ceil_div(planes, Op::kPlanes);
}
template <class Op>
int64_t input_elements(const Problem& p) {
  return elements<Op>(p.channels) + elements<Op>(p.hidden);
}

template <class Op, class N>
struct Common {
  using S = typename Op::S;
  using Element = typename Op::Element;
  static constexpr int kN = kLanes<S>;
  const Problem& p;
  const int64_t pixels;  // of one image
  int64_t t = 0;         // the step
  mutable bool unfit = false;

  explicit Common(const Problem& problem) : p(problem), pixels(problem.height * problem.width) {}

  const N* hidden_plane(int64_t t, int64_t b, int64_t m) const {  // h_t, t from 0; may be null
    if (t > 0)
      return static_cast<const N*>(p.out) + ((b * p.steps + t - 1) * p.hidden + m) * pixels;
    return p.h ? static_cast<const N*>(p.h) + (b * p.hidden + m) * pixels : nullptr;
  }
  S* cell_plane(int64_t t, int64_t b, int64_t m) const {  // c_t, t from 1
    if (t == p.steps || !p.cells) return static_cast<S*>(p.c_last) + (b * p.hidden + m) * pixels;
    return static_cast<S*>(p.cells) + ((b * (p.steps - 1) + t - 1) * p.hidden + m) * pixels;
  }
  const S* cell_before(int64_t t, int64_t b, int64_t m) const {  // c_t, t from 0; may be null
    if (t > 0) return cell_plane(t, b, m);
    return p.c ? static_cast<const S*>(p.c) + (b * p.hidden + m) * pixels : nullptr;
  }
  N* gate_plane(int64_t t, int64_t b, int64_t gate, int64_t m) const {
    return static_cast<N*>(p.gates) + (((b * p.steps + t) * 4 + gate) * p.hidden + m) * pixels;
  }

  // x_t and h_{t-1}, packed; returns how many planes.  `plain` is room for one plane.
  // Sets `unfit` where x or the first h has numbers that do not fit Winograd's form, as the
  // backward does where a gate's gradient has.
  int64_t pack_inputs(const Layout<Op>& layout, const Tile& tile, int64_t t, int64_t plane,
                      Element* plain, Element* dst) const {
    const N* x = static_cast<const N*>(p.x.data) + tile.b * p.x.b + t * p.x.t;
    const N* h = hidden_plane(t, tile.b, 0);
    const auto pack = [&](const N* planes, int64_t stride, int64_t i, int64_t count, int64_t row,
                          int64_t column, bool check) {
      const N* first = planes + i * stride;
      const N* second = Op::kPlanes == 2 && i + 1 < count ? first + stride : nullptr;
      pack_plane<Op>(p, layout, tile, first, second, row, column, layout.paired ? plain : dst);
      if constexpr (Op::kWinograd) {
        if (layout.paired && !check) layout.template split<false>(plain, tile.rows, dst);
        else if (layout.paired && !layout.template split<true>(plain, tile.rows, dst))
          __atomic_store_n(&unfit, true, __ATOMIC_RELAXED);
      }
      dst += plane;
    };
    for (int64_t i = 0; i < p.channels; i += Op::kPlanes)
      pack(x, p.x.c, i, p.channels, p.x.y, p.x.x, true);
    for (int64_t i = 0; i < p.hidden && h; i += Op::kPlanes)
      pack(h, pixels, i, p.hidden, p.width, 1, t == 0);  // later o * tanh(c): at most one
    return elements<Op>(p.channels) + (h ? elements<Op>(p.hidden) : 0);
  }

  // weights[m][part][plane][tap][gate]
  void pack_forward_weights(const Layout<Op>& layout) const {
    Element* to = static_cast<Element*>(p.weights);
    const int64_t of_x = elements<Op>(p.channels);
    for (int64_t m = 0; m < p.hidden; ++m)
      for (int64_t part = 0; part < layout.parts; ++part)
        for (int64_t i = 0; i < input_elements<Op>(p); ++i) {
          const bool x = i < of_x;
          const int64_t first = x ? i * Op::kPlanes : p.channels + (i - of_x) * Op::kPlanes;
          const int64_t end = x ? p.channels : p.channels + p.hidden;
          for (int64_t tap = 0; tap < layout.taps; ++tap)
            for (int64_t gate = 0; gate < 4; ++gate) {
              const auto of_plane = [&](int64_t plane) {
                return plane >= end ? S(0) : layout.part_weight(part, tap, [&](int64_t place) {
                  return this->weight(gate * p.hidden + m, plane, place);
                });
              };
              *to++ = Op::element(of_plane(first), Op::kPlanes == 2 ? of_plane(first + 1) : S(0));
            }
        }
  }
  S weight(int64_t g, int64_t plane, int64_t tap) const {
    const int64_t taps = p.kernel * p.kernel;
    if (plane < p.channels)
      return widen(static_cast<const N*>(p.weight_ih)[(g * p.channels + plane) * taps + tap]);
    return widen(
        static_cast<const N*>(p.weight_hh)[(g * p.hidden + plane - p.channels) * taps + tap]);
  }
  S bias(int64_t gate, int64_t m) const {
    return p.bias ? S(widen(static_cast<const N*>(p.bias)[gate * p.hidden + m])) : S(0);
  }
  // Peephole weight of row i, f or o (0, 1, 2) at one vector of pixels.
  VSOD_INLINE Vec<S> peephole(int row, int64_t m, int64_t pixel, int64_t count) const {
    const N* weights =
        static_cast<const N*>(p.peephole) + row * p.hidden * (p.full_peephole ? pixels : 1);
    if (!p.full_peephole) return broadcast<S>(widen(weights[m]));
    return load_first<S>(weights + m * pixels + pixel, count);
  }

  // The gate arithmetic of one channel and `count` pixels, at most `vectors` vectors of them.
  VSOD_INLINE void finish(int64_t b, int64_t m, int64_t pixel, int64_t vectors, int64_t count,
                          const S* sums) const {
    const S bias_i = this->bias(0, m), bias_f = this->bias(1, m);
    const S bias_g = this->bias(2, m), bias_o = this->bias(3, m);
    const S* before = this->cell_before(t, b, m);
    if (!p.cells && t > 0) before = this->cell_plane(t, b, m);
    S* cell = this->cell_plane(t + 1, b, m);
    N* out = static_cast<N*>(p.out) + ((b * p.steps + t) * p.hidden + m) * this->pixels;
    for (int64_t v = 0; v < vectors; ++v, pixel += kN, count -= kN) {
      Vec<S> i = load(sums + v * kN) + bias_i;
      Vec<S> f = load(sums + (kMaxVectors + v) * kN) + bias_f;
      Vec<S> g = load(sums + (2 * kMaxVectors + v) * kN) + bias_g;
      Vec<S> o = load(sums + (3 * kMaxVectors + v) * kN) + bias_o;
      const Vec<S> c = before ? load_first<S>(before + pixel, count) : Vec<S>{};
      if (p.peephole) {
        i += this->peephole(0, m, pixel, count) * c;
        f += this->peephole(1, m, pixel, count) * c;
      }
      const Quotient<S> q_i = sigmoid(i), q_f = sigmoid(f), q_g = tanh_of(g);
      const Vec<S> under = q_i.under * q_g.under;
      const Vec<S> new_c =
          (q_f.over * c * under + q_i.over * q_g.over * q_f.under) / (under * q_f.under);
      if (p.peephole) o += this->peephole(2, m, pixel, count) * new_c;
      const Quotient<S> q_o = sigmoid(o), q_c = tanh_of(new_c);
      store_first<S>(cell + pixel, new_c, count);
      store_first<S>(out + pixel, q_o.over * q_c.over / (q_o.under * q_c.under), count);
      if (p.gates) {
        i = q_i.value(), f = q_f.value(), g = q_g.value(), o = q_o.value();
        store_first<S>(this->gate_plane(t, b, 0, m) + pixel, i, count);
        store_first<S>(this->gate_plane(t, b, 1, m) + pixel, f, count);
        store_first<S>(this->gate_plane(t, b, 2, m) + pixel, g, count);
        store_first<S>(this->gate_plane(t, b, 3, m) + pixel, o, count);
      }
    }
  }
};

template <class Op>
int64_t forward_weights(const Problem& p) {
  const Layout<Op> layout(p, p.width);
  return 4 * p.hidden * input_elements<Op>(p) * layout.parts * layout.taps;
}

// ------------------------------------------------------------------ forward

template <class Op>
Tiling forward_tiling(const Problem& p) {
  using S = typename Op::S;
  Tiling tiling;
  for (tiling.across = 1;; ++tiling.across) {
    tiling.columns = columns_of<S>(p, tiling.across);
    const Layout<Op> layout(p, tiling.columns);
    const int64_t step = layout.row_step(), planes = input_elements<Op>(p);
    const auto bytes = [&](int64_t rows) {
      return (planes * layout.plane(rows) + layout.plain_plane(rows)) * int64_t(sizeof(S));
    };
    const int64_t all = round_up(p.height, step);
    const int64_t enough =
        smaller(all, round_up(8 + (layout.paired ? 0 : 2 * layout.reach_y), step));
    int64_t rows = step;
    while (rows < all && bytes(rows + step) <= kTileBytes) rows += step;
    tiling.down = ceil_div(p.height, rows);
    tiling.rows = round_up(ceil_div(p.height, tiling.down), step);
    if (rows >= enough || tiling.columns <= 4 * kLanes<S>) break;
  }
  tiling.across = ceil_div(p.width, tiling.columns);
  tiling.down = ceil_div(p.height, tiling.rows);
  return tiling;
}

template <class Op, class N>
struct Forward : Common<Op, N> {
  using Base = Common<Op, N>;
  using S = typename Op::S;
  using Element = typename Op::Element;
  using Base::kN;
  using Base::p;
  using Base::t;

  const Tiling tiling;
  const Layout<Op> layout;
  const int64_t plane;

  explicit Forward(const Problem& problem)
      : Base(problem), tiling(forward_tiling<Op>(problem)), layout(problem, tiling.columns),
        plane(layout.plane(tiling.rows)) {
    layout.write_offsets(p.offsets);
    this->pack_forward_weights(layout);
  }

  struct Places {
    Element *packed, *plain;
    S* sums;

    Places(Scratch& scratch, const Forward& run) {
      packed = scratch.piece<Element>(input_elements<Op>(run.p) * run.plane);
      plain = scratch.piece<Element>(run.layout.plain_plane(run.tiling.rows));
      sums = scratch.piece<S>(Layout<Op>::kSums);
    }
  };

  void run(const Tile& tile, const Places& at) const {
    const int64_t all_planes = input_elements<Op>(p);
    const int64_t planes = this->pack_inputs(layout, tile, t, plane, at.plain, at.packed);
    const Blocks blocks(ceil_div(tile.columns, kN));
    const int64_t per_channel = all_planes * layout.parts * layout.taps * kOutputs;
    for (int64_t m = 0; m < p.hidden; ++m) {
      const Element* weights = static_cast<const Element*>(p.weights) + m * per_channel;
      for (int64_t unit = 0; unit < layout.units(tile.rows); ++unit)
        for (int64_t i = 0; i < blocks.count; ++i) {
          const int64_t first = blocks.first(i), vectors = blocks.first(i + 1) - first;
          const int64_t column = first * kN;
          layout.convolve(int(vectors), at.packed + layout.at(unit, 0) + column, plane, planes,
                          all_planes, p.offsets, weights, at.sums);
          for (int64_t r = 0; r < layout.unit_rows; ++r) {
            const int64_t y = layout.row(unit, r);
            if (y >= tile.rows) continue;
            this->finish(tile.b, m, (tile.y + y) * p.width + tile.x + column, vectors,
                         tile.columns - column, at.sums + r * kOutputs * kMaxVectors * kN);
          }
        }
    }
  }
};

// Returns false where it met numbers that do not fit Winograd's form, and gave up.
template <class Op, class N>
bool try_forward(const Problem& p, Parallel parallel, int64_t* missing) {
  using Run = Forward<Op, N>;
  using Places = typename Run::Places;
  Run run(p);
  for (run.t = 0; run.t < p.steps && !*missing && !run.unfit; ++run.t)
    *missing =
        each_task<Places>(parallel, run.tiling.tiles(p), run,
                          [&](int64_t i, const Places& at) { run.run(run.tiling.tile(p, i), at); });
  return !run.unfit;
}

template <class S, class N>
bool weights_fit(const N* weights, int64_t count) {
  bool fit = true;
  for (int64_t i = 0; i < count; ++i) {
    const S w = widen(weights[i]);
    fit &= !(w > kMostSummed<S> || w < -kMostSummed<S>);
  }
  return fit;
}

// Calls run(problem, missing), and again without Winograd where numbers do not fit.
template <class Op, class N, class Run>
int64_t with_fitting_form(const Problem& problem, const Run& run) {
  using S = typename Op::S;
  Problem p = problem;
  p.direct = !Op::kWinograd ||
             !weights_fit<S>(static_cast<const N*>(p.weight_ih),
                             4 * p.hidden * p.channels * p.kernel * p.kernel) ||
             !weights_fit<S>(static_cast<const N*>(p.weight_hh),
                             4 * p.hidden * p.hidden * p.kernel * p.kernel);
  int64_t missing = 0;
  if (!run(p, &missing)) {
    p.direct = true;
    missing = 0;
    run(p, &missing);
  }
  return missing;
}

template <class Op, class N>
int64_t forward(const Problem& problem, Parallel parallel) {
  return with_fitting_form<Op, N>(problem, [&](const Problem& p, int64_t* missing) {
    return try_forward<Op, N>(p, parallel, missing);
  });
}

// ------------------------------------------------------------------ backward

// Gate lanes of the weight gradient: whole vectors, and pairs of them where there is more than one.
template <class S>
int64_t gate_lanes(const Problem& p) {
  const int64_t lanes = round_up(4 * p.hidden, kLanes<S>);
  return lanes == kLanes<S> ? lanes : round_up(lanes, 2 * kLanes<S>);
}
template <class S>
int64_t gate_panel(const Problem& p) {
  return smaller(gate_lanes<S>(p), 2 * kLanes<S>);
}

// What one group sums: dW [panel][plane][part][tap][panel lanes], db [lanes],
// dpeephole [3][M][vector].
template <class Op>
int64_t group_sums(const Problem& p) {
  using S = typename Op::S;
  const Layout<Op> layout(p, p.width);
  const int64_t planes = p.channels + p.hidden, lanes = gate_lanes<S>(p);
  return lanes * planes * layout.parts * layout.taps + lanes + 3 * p.hidden * kLanes<S>;
}

template <class Op>
int64_t backward_weights(const Problem& p) {
  const Layout<Op> layout(p, p.width);
  const int64_t outputs = round_up(p.hidden, kOutputs) + round_up(p.channels, kOutputs);
  return outputs * 4 * p.hidden * layout.parts * layout.taps;
}

// A strip of the image is one task, taken in bands of a few rows from the top; `halo` is how many
// columns beside its own it needs the gate gradients of.
struct Strips {
  Tiling tiling;
  int64_t band, halo, columns;  // columns: of a band, with its halo
};

// Elements of the large pieces of a task's scratch.
struct Pieces {
  int64_t inputs, window, split, transposed;
};
template <class Op>
Pieces pieces(const Problem& p, const Layout<Op>& layout, const Strips& strips) {
  const int64_t gates = 4 * p.hidden, band = strips.band;
  return {
      (p.channels + p.hidden) * layout.plane(band), gates * layout.plain_plane(band),
      layout.paired ? gates * layout.plane(band) : 0,
      gate_panel<typename Op::S>(p) * layout.units(band) * layout.parts * strips.tiling.columns};
}

template <class Op>
Strips backward_strips(const Problem& p) {
  using S = typename Op::S;
  constexpr int kN = kLanes<S>;
  Strips strips;
  Tiling& tiling = strips.tiling;
  for (tiling.across = 1;; ++tiling.across) {
    tiling.columns = columns_of<S>(p, tiling.across);
    strips.halo = tiling.across == 1 ? 0 : round_up(Layout<Op>(p, p.width).reach_x, kN);
    strips.columns = smaller(p.width, tiling.columns + 2 * strips.halo);
    const Layout<Op> layout(p, strips.columns);
    const int64_t step = layout.row_step(), all = round_up(p.height, step);
    const int64_t enough = smaller(all, layout.paired ? step : 2 * layout.reach_y + 2);
    const auto fits = [&](int64_t band) {
      strips.band = band;
      const Pieces needs = pieces(p, layout, strips);
      return (needs.inputs + larger(needs.window, needs.split) + needs.transposed) *
                 int64_t(sizeof(S)) <=
             kTileBytes;
    };
    int64_t band = step;
    while (band < all && band < kMostBand * step && fits(band + step)) band += step;
    const bool good = band >= enough && fits(band);
    strips.band = band;
    // Above and below a strip, gate gradients are made twice.
    const int64_t rows = larger(p.gates ? kStripRows : kRecomputedStripRows, 4 * layout.reach_y);
    tiling.rows = round_up(smaller(rows, p.height), band);
    if (good || tiling.columns <= 4 * kN) break;
  }
  tiling.across = ceil_div(p.width, tiling.columns);
  tiling.down = ceil_div(p.height, tiling.rows);
  return strips;
}

template <class Op>
int64_t groups(const Problem& p) {
  const Tiling tiling = backward_strips<Op>(p).tiling;
  const int64_t tiles = p.full_peephole ? tiling.down * tiling.across : tiling.tiles(p);
  const int64_t fit = kSumBytes / (group_sums<Op>(p) * int64_t(sizeof(typename Op::S)));
  return smaller(tiles, smaller(larger(fit, kFewestGroups), kMostGroups));
}

template <class Op, class N>
struct GateGradients : Common<Op, N> {
  using Base = Common<Op, N>;
  using S = typename Op::S;
  using Base::kN;
  using Base::p;
  using Base::t;
  int64_t gate_stride = 0;  // between the gates of a channel, where they are written
  bool check = false;       // whether they have to fit Winograd's form

  explicit GateGradients(const Problem& problem) : Base(problem) {}

  S* dh_plane(int64_t step, int64_t b, int64_t m) const {
    return static_cast<S*>(p.dh_of[step & 1]) + b * p.dh_batch[step & 1] + m * this->pixels;
  }

  // One channel, one row, `vectors` vectors from column x on.  conv: the sums of its gates, where
  // they are not kept.  to: where its gate i is written.
  VSOD_INLINE void gate_gradients_of(const Tile& strip, const Tile& wide, int64_t m, int64_t y,
                                     int64_t x, int64_t vectors, const S* conv, S* to,
                                     S* peephole_sums) const {
    const int64_t b = strip.b;
    const bool own_row = y >= strip.y && y < strip.y + strip.rows;
    const S* before = this->cell_before(t, b, m);
    const S* after = this->cell_plane(t + 1, b, m);
    const int64_t state = (b * p.hidden + m) * this->pixels;
    const bool last = t == p.steps - 1;
    const S* dh_after = last ? nullptr : dh_plane(t + 1, b, m);
    const S* dc_after = static_cast<const S*>(last ? p.grad_c : p.dc_of[(t + 1) & 1]);
    if (dc_after) dc_after += state;
    S* dc_before = static_cast<S*>(p.dc_of[t & 1]) + state;
    const Frames& grad = p.grad_out;
    const N* grad_row = nullptr;
    if (grad.data)
      grad_row = static_cast<const N*>(grad.data) + b * grad.b + t * grad.t + m * grad.c +
                 y * grad.y + x * grad.x;
    int64_t pixel = y * p.width + x, count = wide.x + wide.columns - x;
    auto beyond = Vec<S>{} > kMostSummed<S>;
    for (int64_t v = 0; v < vectors; ++v, pixel += kN, x += kN, count -= kN, to += kN) {
      const Vec<S> c = before ? load_first<S>(before + pixel, count) : Vec<S>{};
      const Vec<S> new_c = load_first<S>(after + pixel, count);
      Vec<S> i, f, g, o;
      if (conv) {
        const S* sums = conv + v * kN;
        i = load(sums) + this->bias(0, m);
        f = load(sums + kMaxVectors * kN) + this->bias(1, m);
        g = load(sums + 2 * kMaxVectors * kN) + this->bias(2, m);
        o = load(sums + 3 * kMaxVectors * kN) + this->bias(3, m);
        if (p.peephole) {
          i += this->peephole(0, m, pixel, count) * c;
          f += this->peephole(1, m, pixel, count) * c;
          o += this->peephole(2, m, pixel, count) * new_c;
        }
        i = sigmoid(i).value(), f = sigmoid(f).value();
        g = tanh_of(g).value(), o = sigmoid(o).value();
      } else {
        i = load_first<S>(this->gate_plane(t, b, 0, m) + pixel, count);
        f = load_first<S>(this->gate_plane(t, b, 1, m) + pixel, count);
        g = load_first<S>(this->gate_plane(t, b, 2, m) + pixel, count);
        o = load_first<S>(this->gate_plane(t, b, 3, m) + pixel, count);
      }
      Vec<S> dh = dh_after ? load_first<S>(dh_after + pixel, count) : Vec<S>{};
      if (grad_row) {
        if (grad.x == 1) {
          dh += load_first<S>(grad_row + v * kN, count);
        } else if (grad.x == 0) {
          dh += S(widen(grad_row[0]));
        } else {
          for (int k = 0; k < kN && k < count; ++k)
            dh[k] += S(widen(grad_row[(v * kN + k) * grad.x]));
        }
      }
      const Vec<S> tanh_c = tanh_of(new_c).value();
      Vec<S> d_o = dh * tanh_c * o * (S(1) - o);
      Vec<S> dc = dh * o * (S(1) - tanh_c * tanh_c);
      if (dc_after) dc += load_first<S>(dc_after + pixel, count);
      if (p.peephole) dc += this->peephole(2, m, pixel, count) * d_o;
      Vec<S> di = dc * g * i * (S(1) - i);
      Vec<S> df = dc * c * f * (S(1) - f);
      Vec<S> dg = dc * i * (S(1) - g * g);
      if (own_row && x >= strip.x && x < strip.x + strip.columns) {
        dc *= f;
        if (p.peephole) {
          dc += this->peephole(0, m, pixel, count) * di + this->peephole(1, m, pixel, count) * df;
          if (p.dpeephole)
            add_peephole(m, pixel, count, di * c, df * c, d_o * new_c, peephole_sums);
        }
        store_first<S>(dc_before + pixel, dc, count);
      }
      if (count < kN) {
        di = keep_first(di, int(count), S(0)), df = keep_first(df, int(count), S(0));
        dg = keep_first(dg, int(count), S(0)), d_o = keep_first(d_o, int(count), S(0));
      }
      store(to, di);
      store(to + gate_stride, df);
      store(to + 2 * gate_stride, dg);
      store(to + 3 * gate_stride, d_o);
      if (check) {
        const Vec<S> gradients[4] = {di, df, dg, d_o};
        for (const Vec<S>& d : gradients) beyond |= (d > kMostSummed<S>) | (d < -kMostSummed<S>);
      }
    }
    bool any_beyond = false;
    for (int i = 0; i < kN; ++i) any_beyond |= beyond[i] != 0;
    if (any_beyond) __atomic_store_n(&this->unfit, true, __ATOMIC_RELAXED);
  }

  void add_peephole(int64_t m, int64_t pixel, int64_t count, Vec<S> di, Vec<S> df, Vec<S> d_o,
                    S* peephole_sums) const {
    const Vec<S> terms[3] = {di, df, d_o};
    for (int row = 0; row < 3; ++row) {
      if (p.full_peephole) {  // the group owns these pixels
        S* to = static_cast<S*>(p.dpeephole) + (row * p.hidden + m) * this->pixels + pixel;
        store_first<S>(to, load_first<S>(to, count) + terms[row], count);
      } else {
        S* to = peephole_sums + (row * p.hidden + m) * kN;
        const Vec<S> kept = count >= kN ? terms[row] : keep_first(terms[row], int(count), S(0));
        store(to, load(to) + kept);
      }
    }
  }
};

template <class Op, class N>
struct Backward : GateGradients<Op, N> {
  using Base = GateGradients<Op, N>;
  using S = typename Op::S;
  using Base::kN;
  using Base::p;
  using Base::t;
  static constexpr int64_t kRow = kOutputs * kMaxVectors * kN;  // sums of one row

  const Strips strips;
  const Layout<Op> layout;
  const int64_t gates, lanes, panel_lanes, plane, window_plane;
  const int64_t hidden_blocks, channel_blocks;  // of outputs: dh, and dx where it is needed
  const bool need_weights, sum_peephole;

  explicit Backward(const Problem& problem)
      : Base(problem), strips(backward_strips<Op>(problem)), layout(problem, strips.columns),
        gates(4 * problem.hidden), lanes(gate_lanes<S>(problem)),
        panel_lanes(gate_panel<S>(problem)), plane(layout.plane(strips.band)),
        window_plane(layout.plain_plane(strips.band)),
        hidden_blocks(ceil_div(problem.hidden, kOutputs)),
        channel_blocks(problem.dx ? ceil_div(problem.channels, kOutputs) : 0),
        need_weights(problem.dweight_ih || problem.dweight_hh),
        sum_peephole(problem.dpeephole && !problem.full_peephole) {
    this->gate_stride = p.hidden * window_plane;
    this->check = layout.paired;
    layout.write_offsets(p.offsets);
    if (!p.gates) this->pack_forward_weights(layout);
    pack_backward_weights();
  }

  // weights[block of outputs][part][gate plane][tap][output] of the flipped kernel: first blocks
  // of h, then blocks of x.
  void pack_backward_weights() const {
    S* to = static_cast<S*>(p.backward_weights);
    for (int64_t block = 0; block < hidden_blocks + channel_blocks; ++block) {
      const bool of_h = block < hidden_blocks;
      const int64_t first = (of_h ? block : block - hidden_blocks) * kOutputs;
      const int64_t end = of_h ? p.hidden : p.channels;
      for (int64_t part = 0; part < layout.parts; ++part)
        for (int64_t g = 0; g < gates; ++g)
          for (int64_t tap = 0; tap < layout.taps; ++tap)
            for (int64_t j = first; j < first + kOutputs; ++j)
              *to++ = j >= end ? S(0) : layout.part_weight(part, tap, [&](int64_t i) {
                return this->weight(g, of_h ? p.channels + j : j, p.kernel * p.kernel - 1 - i);
              });
    }
  }

  struct Places {
    S *inputs, *window, *split, *plain, *transposed, *sums, *peephole_sums;
    int64_t window_numbers, peephole_numbers;

    Places(Scratch& scratch, const Backward& run) : peephole_numbers(3 * run.p.hidden * kN) {
      const Pieces needs = pieces(run.p, run.layout, run.strips);
      inputs = scratch.piece<S>(needs.inputs);
      window = scratch.piece<S>(needs.window);
      split = scratch.piece<S>(needs.split);
      plain = scratch.piece<S>(run.layout.paired ? run.window_plane : 0);
      transposed = scratch.piece<S>(needs.transposed);
      sums = scratch.piece<S>(Layout<Op>::kSums);
      peephole_sums = scratch.piece<S>(peephole_numbers);
      window_numbers = needs.window;
    }
  };

  // Step t of one group's strips.
  void run_group(int64_t group, const Places& at) const {
    // Whole pixels a group where each pixel has a weight of its own.
    const int64_t unit = p.full_peephole ? p.batch : 1, units = strips.tiling.tiles(p) / unit;
    const int64_t last = (group + 1) * units / p.groups * unit;
    S* sums = static_cast<S*>(p.sums) + group * group_sums<Op>(p);
    for (int64_t i = group * units / p.groups * unit; i < last; ++i)
      run(strips.tiling.tile(p, i), sums, at);
  }

  // Step t of one strip.  The window holds the gate gradients of a band and of the rows above and
  // below it that the convolution reaches; it moves down the strip.
  void run(const Tile& strip, S* group, const Places& at) const {
    memset(at.peephole_sums, 0, at.peephole_numbers * sizeof(S));
    memset(at.window, 0, at.window_numbers * sizeof(S));

    Tile wide = strip;  // with the halo
    wide.x = larger(strip.x - strips.halo, 0);
    wide.columns = smaller(strip.x + strip.columns + strips.halo, p.width) - wide.x;
    const int64_t reach = layout.reach_y, band_rows = strips.band;
    for (int64_t row = 0; row < 2 * reach; row += band_rows) {
      wide.y = strip.y - reach + row, wide.rows = smaller(band_rows, 2 * reach - row);
      gate_gradients(strip, wide, row, at);
    }
    for (int64_t y = 0; y < strip.rows; y += band_rows) {
      wide.y = strip.y + y + reach, wide.rows = band_rows;
      gate_gradients(strip, wide, 2 * reach, at);
      const Tile band{strip.b, strip.y + y, strip.x, smaller(band_rows, strip.rows - y),
                      strip.columns};
      input_gradients(band, strip.x - wide.x, at);
      if (need_weights || p.dbias) weight_gradients(band, strip.x - wide.x, at, group);
      for (int64_t g = 0; g < gates && reach; ++g) {
        S* plane = at.window + g * window_plane;
        memmove(plane, plane + band_rows * layout.pitch,
                (2 * reach * layout.pitch + layout.reach_x) * sizeof(S));
      }
    }
    S* peephole_total = group + group_sums<Op>(p) - 3 * p.hidden * kN;
    if (sum_peephole)
      for (int64_t i = 0; i < at.peephole_numbers; ++i) peephole_total[i] += at.peephole_sums[i];
  }

  // Rows of the window from `window_row` on, and dc where the strip owns the pixel.
  void gate_gradients(const Tile& strip, const Tile& wide, int64_t window_row,
                      const Places& at) const {
    const int64_t all_planes = p.channels + p.hidden;
    const int64_t first_row = larger(wide.y, 0), end_row = smaller(wide.y + wide.rows, p.height);
    for (int64_t row = 0; row < wide.rows; ++row)
      if (wide.y + row < first_row || wide.y + row >= end_row)
        for (int64_t g = 0; g < gates; ++g)
          memset(at.window + g * window_plane + (window_row + row) * layout.pitch + layout.reach_x,
                 0, layout.pitch * sizeof(S));
    if (first_row >= end_row) return;
    int64_t planes = 0;
    if (!p.gates) planes = this->pack_inputs(layout, wide, t, plane, at.plain, at.inputs);
    const Blocks blocks(ceil_div(wide.columns, kN));
    const int64_t per_channel = all_planes * layout.parts * layout.taps * kOutputs;
    for (int64_t m = 0; m < p.hidden; ++m) {
      const S* weights = static_cast<const S*>(p.weights) + m * per_channel;
      for (int64_t unit = 0; unit < layout.units(wide.rows); ++unit) {
        bool inside[2] = {};
        for (int64_t r = 0; r < layout.unit_rows; ++r) {
          const int64_t y = wide.y + layout.row(unit, r);
          inside[r] = y >= first_row && y < end_row;
        }
        if (!inside[0] && !inside[1]) continue;
        for (int64_t i = 0; i < blocks.count; ++i) {
          const int64_t first = blocks.first(i), vectors = blocks.first(i + 1) - first;
          const int64_t column = first * kN;
          if (!p.gates)
            layout.convolve(int(vectors), at.inputs + layout.at(unit, 0) + column, plane, planes,
                            all_planes, p.offsets, weights, at.sums);
          for (int64_t r = 0; r < layout.unit_rows; ++r) {
            if (!inside[r]) continue;
            const int64_t row = layout.row(unit, r);
            S* to = at.window + m * window_plane + (window_row + row) * layout.pitch +
                    layout.margin + column;
            this->gate_gradients_of(strip, wide, m, wide.y + row, wide.x + column, vectors,
                                    p.gates ? nullptr : at.sums + r * kRow, to, at.peephole_sums);
          }
        }
      }
    }
  }

  // dh_{t-1} and dx_t of a band; `shift`: columns from the window's first to the band's.
  void input_gradients(const Tile& band, int64_t shift, const Places& at) const {
    const int64_t first_block = t > 0 || p.dh ? 0 : hidden_blocks;
    const int64_t end_block = hidden_blocks + channel_blocks;
    if (first_block >= end_block) return;
    const S* in = at.window;
    if (layout.paired) {
      for (int64_t g = 0; g < gates; ++g)
        layout.template split<false>(at.window + g * window_plane, band.rows, at.split + g * plane);
      in = at.split;
    }
    const int64_t in_plane = layout.paired ? plane : window_plane;
    const Blocks blocks(ceil_div(band.columns, kN));
    const int64_t per_block = gates * layout.parts * layout.taps * kOutputs;
    for (int64_t block = first_block; block < end_block; ++block) {
      const bool of_h = block < hidden_blocks;
      const int64_t first_output = (of_h ? block : block - hidden_blocks) * kOutputs;
      const int64_t outputs = smaller(kOutputs, (of_h ? p.hidden : p.channels) - first_output);
      const S* weights = static_cast<const S*>(p.backward_weights) + block * per_block;
      for (int64_t unit = 0; unit < layout.units(band.rows); ++unit)
        for (int64_t i = 0; i < blocks.count; ++i) {
          const int64_t first = blocks.first(i), vectors = blocks.first(i + 1) - first;
          const int64_t column = first * kN, count = band.columns - column;
          layout.convolve(int(vectors), in + layout.at(unit, 0) + shift + column, in_plane, gates,
                          gates, p.offsets, weights, at.sums);
          for (int64_t r = 0; r < layout.unit_rows; ++r) {
            const int64_t row = layout.row(unit, r);
            if (row >= band.rows) continue;
            const int64_t pixel = (band.y + row) * p.width + band.x + column;
            for (int64_t j = 0; j < outputs; ++j) {
              const S* sums = at.sums + r * kRow + j * kMaxVectors * kN;
              const int64_t m = first_output + j;
              if (!of_h)
                write(static_cast<N*>(p.dx) +
                          ((band.b * p.steps + t) * p.channels + m) * this->pixels + pixel,
                      sums, vectors, count);
              else if (t > 0) write(this->dh_plane(t, band.b, m) + pixel, sums, vectors, count);
              else
                write(static_cast<N*>(p.dh) + (band.b * p.hidden + m) * this->pixels + pixel, sums,
                      vectors, count);
            }
          }
        }
    }
  }

  template <class D>
  static VSOD_INLINE void write(D* dst, const S* sums, int64_t vectors, int64_t count) {
    for (int64_t v = 0; v < vectors; ++v)
      store_first<S>(dst + v * kN, load(sums + v * kN), count - v * kN);
  }

  // dW and db of a band, added to the group's.  The transpose of F(2, 3): for the gate gradients
  // e0, e1 of two rows, part 0 of the inputs is multiplied with e0, 1 with e0 + e1, 2 with e0 - e1,
  // 3 with e1.
  void weight_gradients(const Tile& band, int64_t shift, const Places& at, S* group) const {
    const int64_t planes =
        need_weights ? this->pack_inputs(layout, band, t, plane, at.plain, at.inputs) : 0;
    const int64_t first_plane = p.dweight_ih ? 0 : p.channels;
    const int64_t end_plane = p.dweight_hh ? planes : smaller(p.channels, planes);
    const int64_t units = layout.units(band.rows), columns = strips.tiling.columns;
    const int64_t depth_columns = smaller(band.columns, kDepthPixels);
    const int64_t depth_units = larger(1, kDepthPixels / band.columns);
    const int64_t sum_stride = layout.parts * layout.taps * panel_lanes;
    for (int64_t panel = 0; panel < lanes; panel += panel_lanes) {
      transpose(band, shift, panel, at, group);
      S* panel_sums = group + panel * (p.channels + p.hidden) * layout.parts * layout.taps;
      for (int64_t unit = 0; unit < units && first_plane < end_plane; unit += depth_units)
        for (int64_t x = 0; x < band.columns; x += depth_columns) {
          Depth depth{smaller(depth_units, units - unit), smaller(depth_columns, band.columns - x),
                      0, 0};
          depth.a_row = layout.unit_stride() - depth.columns;
          depth.b_row = (columns - depth.columns) * panel_lanes;
          for (int64_t part = 0; part < layout.parts; ++part) {
            const S* b = at.transposed +
                         ((part * layout.units(strips.band) + unit) * columns + x) * panel_lanes;
            for (int64_t plane = first_plane; plane < end_plane; plane += kWeightRows) {
              const int64_t some = smaller(kWeightRows, end_plane - plane);
              for (int64_t tap = 0; tap < layout.taps; ++tap) {
                const S* a =
                    at.inputs + plane * this->plane + layout.at(unit, part) + x + p.offsets[tap];
                S* sums =
                    panel_sums + plane * sum_stride + (part * layout.taps + tap) * panel_lanes;
                if (panel_lanes == kN)
                  weight_rows<S, 1>(some, a, this->plane, b, kN, depth, sums, sum_stride);
                else weight_rows<S, 2>(some, a, this->plane, b, 2 * kN, depth, sums, sum_stride);
              }
            }
          }
        }
    }
  }

  // transposed[part][unit][column][panel lanes] from the window, and its sum over pixels.
  void transpose(const Tile& band, int64_t shift, int64_t panel, const Places& at, S* group) const {
    S* bias_sums = group + group_sums<Op>(p) - 3 * p.hidden * kN - lanes;
    const int64_t per_row = strips.tiling.columns * panel_lanes;
    const int64_t per_part = layout.units(strips.band) * per_row;
    const int64_t last_part = layout.parts - 1;
    for (int64_t lane = 0; lane < panel_lanes; lane += kN) {
      const int64_t first = panel + lane;
      Vec<S> sum = {};
      for (int64_t unit = 0; unit < layout.units(band.rows); ++unit)
        for (int64_t x = 0; x < band.columns; x += kN) {
          const int64_t count = smaller(kN, band.columns - x);
          S* to = at.transposed + unit * per_row + x * panel_lanes + lane;
          for (int64_t r = 0; r < layout.unit_rows; ++r) {
            const S* from = at.window + first * window_plane + layout.margin + shift + x +
                            (layout.row(unit, r) + layout.reach_y) * layout.pitch;
            Vec<S> square[kN] = {};
#pragma GCC unroll 16
            for (int j = 0; j < kN; ++j)
              if (first + j < gates) square[j] = load(from + j * window_plane);
            transpose_square<S>(square);
            S* rows = to + r * last_part * per_part;
            if (count == kN) {
#pragma GCC unroll 16
              for (int j = 0; j < kN; ++j) store(rows + j * panel_lanes, square[j]);
            } else {
              for (int j = 0; j < count; ++j) store(rows + j * panel_lanes, square[j]);
            }
          }
          for (int j = 0; j < count; ++j, to += panel_lanes) {
            if (layout.paired) {
              const Vec<S> one = load(to), two = load(to + 3 * per_part);
              store(to + per_part, one + two);
              store(to + 2 * per_part, one - two);
              sum += one + two;
            } else {
              sum += load(to);
            }
          }
        }
      store(bias_sums + first, load(bias_sums + first) + sum);
    }
  }

  // Adds the groups, in order.  One task is one gate.
  void reduce(int64_t g) const {
    const int64_t planes = p.channels + p.hidden, size = group_sums<Op>(p);
    const int64_t taps = layout.parts * layout.taps, all_taps = p.kernel * p.kernel;
    const S* sums = static_cast<const S*>(p.sums);
    const int64_t panel = g / panel_lanes * panel_lanes;
    const S* of_gate = sums + panel * planes * taps + g % panel_lanes;
    for (int64_t plane = 0; plane < planes; ++plane) {
      const bool of_x = plane < p.channels;
      S* to = static_cast<S*>(of_x ? p.dweight_ih : p.dweight_hh);
      if (!to) continue;
      to += (of_x ? g * p.channels + plane : g * p.hidden + plane - p.channels) * all_taps;
      memset(to, 0, all_taps * sizeof(S));
      for (int64_t tap = 0; tap < layout.taps; ++tap) {
        const auto part = [&](int64_t i) {
          return total(of_gate + (plane * taps + i * layout.taps + tap) * panel_lanes, size);
        };
        if (layout.paired) {
          const S one = part(1), two = part(2);
          to[layout.stored(0, tap)] = part(0) + (one + two) / 2;
          to[layout.stored(1, tap)] = (one - two) / 2;
          to[layout.stored(2, tap)] = (one + two) / 2 + part(3);
        } else {
          to[layout.stored(tap / layout.kernel_x, tap % layout.kernel_x)] = part(0);
        }
      }
    }
    const S* rest = sums + lanes * planes * taps;
    if (p.dbias) static_cast<S*>(p.dbias)[g] = total(rest + g, size);
    if (p.dpeephole && !p.full_peephole && g < 3 * p.hidden) {
      S sum = 0;
      for (int lane = 0; lane < kN; ++lane) sum += total(rest + lanes + g * kN + lane, size);
      static_cast<S*>(p.dpeephole)[g] = sum;
    }
  }
  S total(const S* first, int64_t stride) const {
    S sum = 0;
    for (int64_t group = 0; group < p.groups; ++group) sum += first[group * stride];
    return sum;
  }
};

template <class Op, class N>
bool try_backward(const Problem& p, Parallel parallel, int64_t* missing) {
  using Run = Backward<Op, N>;
  using S = typename Op::S;
  using Places = typename Run::Places;
  Run run(p);
  memset(p.sums, 0, p.groups * group_sums<Op>(p) * sizeof(S));
  if (p.dpeephole && p.full_peephole) memset(p.dpeephole, 0, 3 * p.hidden * run.pixels * sizeof(S));
  for (run.t = p.steps - 1; run.t >= 0 && !*missing && !run.unfit; --run.t)
    *missing = each_task<Places>(parallel, p.groups, run, [&](int64_t group, const Places& at) {
      run.run_group(group, at);
    });
  if (!*missing && !run.unfit) each_task(parallel, run.gates, [&](int64_t g) { run.reduce(g); });
  return !run.unfit;
}

template <class Op, class N>
int64_t backward(const Problem& problem, Parallel parallel) {
  return with_fitting_form<Op, N>(problem, [&](const Problem& p, int64_t* missing) {
    return try_backward<Op, N>(p, parallel, missing);
  });
}

// ------------------------------------------------------------------ around another convolution

// The gates of one step, and their gradients, where the library convolves.  An image is one row.
// A task is a channel: it sums its own gradients of biases and peepholes, batch after batch and
// step after step.
template <class S, class N>
struct Gates : GateGradients<PlainOp<S>, N> {
  using Base = GateGradients<PlainOp<S>, N>;
  using Base::kN;
  using Base::p;
  using Base::t;

  Gates(const Problem& image, int64_t step) : Base(image) {
    t = step;
    this->gate_stride = round_up(this->pixels, kN);
  }

  struct Places {
    S *sums, *gradients, *peephole_sums;

    Places(Scratch& scratch, const Gates& run) {
      sums = scratch.piece<S>(kOutputs * kMaxVectors * kN);
      gradients = scratch.piece<S>(run.p.dgates ? 4 * run.gate_stride : 0);
      peephole_sums = scratch.piece<S>(run.p.dpeephole ? 3 * run.p.hidden * kN : 0);
    }
  };

  // As `finish` reads them.
  void read_sums(int64_t b, int64_t m, int64_t pixel, int64_t vectors, S* to) const {
    for (int64_t gate = 0; gate < 4; ++gate) {
      const int64_t place = (gate * p.hidden + m) * this->pixels + pixel;
      const S* x = static_cast<const S*>(p.of_x.data) + b * p.of_x.batch + place;
      const S* h = static_cast<const S*>(p.of_h.data);
      if (h) h += b * p.of_h.batch + place;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t count = this->pixels - pixel - v * kN;
        Vec<S> sum = load_first<S>(x + v * kN, count);
        if (h) sum += load_first<S>(h + v * kN, count);
        store(to + (gate * kMaxVectors + v) * kN, sum);
      }
    }
  }

  void forward(int64_t m, const Places& at) const {
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t pixel = 0; pixel < this->pixels; pixel += kMaxVectors * kN) {
        const int64_t count = this->pixels - pixel;
        const int64_t vectors = smaller(kMaxVectors, ceil_div(count, kN));
        read_sums(b, m, pixel, vectors, at.sums);
        this->finish(b, m, pixel, vectors, count, at.sums);
      }
  }

  void backward(int64_t m, const Places& at) const {
    S* dbias = static_cast<S*>(p.dbias);
    for (int64_t gate = 0; gate < 4 && dbias && t == p.steps - 1; ++gate)
      dbias[gate * p.hidden + m] = 0;
    for (int64_t row = 0; row < 3 && p.dpeephole; ++row) {
      memset(at.peephole_sums + (row * p.hidden + m) * kN, 0, kN * sizeof(S));
      const int64_t each = p.full_peephole ? this->pixels : 1;
      if (t == p.steps - 1)
        memset(static_cast<S*>(p.dpeephole) + (row * p.hidden + m) * each, 0, each * sizeof(S));
    }
    for (int64_t b = 0; b < p.batch; ++b) {
      const Tile image{b, 0, 0, 1, this->pixels};
      for (int64_t pixel = 0; pixel < this->pixels; pixel += kMaxVectors * kN) {
        const int64_t vectors = smaller(kMaxVectors, ceil_div(this->pixels - pixel, kN));
        if (!p.gates) read_sums(b, m, pixel, vectors, at.sums);
        this->gate_gradients_of(image, image, m, 0, pixel, vectors, p.gates ? nullptr : at.sums,
                                at.gradients + pixel, at.peephole_sums);
      }
      S* to = static_cast<S*>(p.dgates) + b * p.dgates_batch + m * this->pixels;
      for (int64_t gate = 0; gate < 4; ++gate) {
        const S* from = at.gradients + gate * this->gate_stride;
        memcpy(to + gate * p.hidden * this->pixels, from, this->pixels * sizeof(S));
        if (!dbias) continue;
        Vec<S> sum = {};  // image by image: many short sums lose less than the library's long one
        for (int64_t v = 0; v < this->gate_stride; v += kN) sum += load(from + v);
        dbias[gate * p.hidden + m] += horizontal_sum<S>(sum);
      }
    }
    if (!p.dpeephole || p.full_peephole) return;
    for (int64_t row = 0; row < 3; ++row)
      static_cast<S*>(p.dpeephole)[row * p.hidden + m] +=
          horizontal_sum<S>(load(at.peephole_sums + (row * p.hidden + m) * kN));
  }
};

template <class S, class N, bool kBackward>
int64_t step_gates(const Problem& problem, int64_t step, Parallel parallel) {
  using Run = Gates<S, N>;
  using Places = typename Run::Places;
  Problem p = problem;
  p.width *= p.height, p.height = 1;
  const Run run(p, step);
  return each_task<Places>(parallel, p.hidden, run, [&](int64_t m, const Places& at) {
    if (kBackward) run.backward(m, at);
    else run.forward(m, at);
  });
}

// Below so many products of a step, the way to the library costs more than it saves.
constexpr int64_t kFewestOfLibrary = 1 << 22;

// Whether the library's convolution is faster (docs/conv_lstm.md): where the rows of an image leave
// lanes empty, or are few for the weights that pass by each tile.
template <class S>
bool library_is_faster(const Problem& p) {
  const int64_t planes = p.channels + p.hidden;
  const int64_t products =  // of one step
      p.batch * p.height * p.width * planes * 4 * p.hidden * p.kernel * p.kernel;
  if (sizeof(S) == 8 || planes < 24 || products < kFewestOfLibrary) return false;
  return p.width < kLanes<S> || (planes >= 192 && 2 * p.width <= 3 * kLanes<S>);
}

template <class S>
void activate(const void* x, void* sigmoids, void* tanhs, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<S>) {
    const Vec<S> v = load_first<S>(static_cast<const S*>(x) + i, count - i);
    store_first<S>(static_cast<S*>(sigmoids) + i, sigmoid(v).value(), count - i);
    store_first<S>(static_cast<S*>(tanhs) + i, tanh_of(v).value(), count - i);
  }
}

template <class Op, class Back, class N, class S = typename Op::S>
constexpr Kernel kKernel = {forward_weights<Back>,  backward_weights<Back>,
                            group_sums<Back>,       groups<Back>,
                            forward<Op, N>,         backward<Back, N>,
                            library_is_faster<S>,   step_gates<S, N, false>,
                            step_gates<S, N, true>, activate<S>};

}  // namespace

extern const Kernel* const conv_lstm_kernels[];
#if defined(__AVX512BF16__)
const Kernel* const conv_lstm_kernels[] = {nullptr, nullptr, nullptr,
                                           &kKernel<PairOp, PlainOp<float>, BFloat16>};
#else
template <class S, class N>
constexpr Kernel kPlain = kKernel<PlainOp<S>, PlainOp<S>, N>;
const Kernel* const conv_lstm_kernels[] = {&kPlain<float, float>, &kPlain<double, double>,
                                           &kPlain<float, Float16>, &kPlain<float, BFloat16>};
#endif

}  // namespace VSOD_LEVEL
}  // namespace vsod
