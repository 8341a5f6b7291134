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
//     backward     step t, from the last: dh_{t-1} and dx_t are convolutions of the gate gradients
//                  of step t with the flipped weights, so the pass that packs dgates[t + 1] makes
//                  dx[t + 1], dh[t], then dgates[t] and dc.  dgates of two steps exist, no more.
//     weights      dW[g, plane, tap] = sum over pixels of dgates[g] * plane shifted by the tap:
//                  weight_block, rows are planes (broadcast), lanes are gates, the depth is the
//                  pixels of the tile, whose dgates are transposed for it while they are hot.
// Tiles are dealt to a fixed number of groups; each sums its own dW in order, and the groups are
// added in order, so the bits do not depend on the threads.

#include "cpu.h"

#include <stdlib.h>

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
constexpr int kWeightRows = 8;               // planes in one weight_block
constexpr int64_t kTileBytes = 448 * 1024;   // scratch of one task: fits a 1 MB L2 with its streams
constexpr int64_t kDepthPixels = 256;        // pixels of one weight_block: its operands fit L1
constexpr int64_t kSumBytes = 8 << 20;       // of all groups together
constexpr int64_t kMostGroups = 64, kFewestGroups = 4;

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

VSOD_INLINE Vec<float> absolute(Vec<float> x) {
  return Vec<float>(Vec<int32_t>(x) & 0x7fffffff);
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
template <class S, int V>
void conv_block(const S* in, int64_t plane_stride, int64_t planes, const int32_t* offsets,
                int64_t taps, const S* weights, S* sums) {
  constexpr int kN = kLanes<S>;
  Vec<S> sum[kOutputs][V] = {};
  for (int64_t plane = 0; plane < planes; ++plane) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      const S* at = in + offsets[tap];
      Vec<S> x[V];
#pragma GCC unroll 6
      for (int v = 0; v < V; ++v) x[v] = load(at + v * kN);
#pragma GCC unroll 4
      for (int j = 0; j < kOutputs; ++j) {
        const Vec<S> w = broadcast(weights[j]);
#pragma GCC unroll 6
        for (int v = 0; v < V; ++v) sum[j][v] += w * x[v];
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

template <class S>
VSOD_INLINE void conv(int vectors, const S* in, int64_t plane_stride, int64_t planes,
                      const int32_t* offsets, int64_t taps, const S* weights, S* sums) {
  switch (vectors) {
    case 1: return conv_block<S, 1>(in, plane_stride, planes, offsets, taps, weights, sums);
    case 2: return conv_block<S, 2>(in, plane_stride, planes, offsets, taps, weights, sums);
    case 3: return conv_block<S, 3>(in, plane_stride, planes, offsets, taps, weights, sums);
#if defined(__AVX512F__)
    case 4: return conv_block<S, 4>(in, plane_stride, planes, offsets, taps, weights, sums);
    case 5: return conv_block<S, 5>(in, plane_stride, planes, offsets, taps, weights, sums);
    case 6: return conv_block<S, 6>(in, plane_stride, planes, offsets, taps, weights, sums);
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

// ------------------------------------------------------------------ tasks and scratch

struct Tile {
  int64_t b, y, x, rows, columns;
};

// The cut of an image into tiles, and the layout of the planes that a task packs.
template <class S>
struct Tiling {
  int64_t reach;         // of the kernel, in pixels
  int64_t margin;        // columns left of a packed row's first pixel: `reach`, whole vectors
  int64_t rows, columns; // of a tile
  int64_t down, across;  // tiles in an image
  int64_t pitch;         // of a packed row
  int64_t plane;         // of a packed plane

  // packed_planes: planes with a border; bare_planes: those without.
  Tiling(const Problem& p, int64_t packed_planes, int64_t bare_planes) {
    constexpr int kN = kLanes<S>;
    reach = p.kernel / 2 * p.dilation;
    margin = round_up(reach, kN);
    for (across = 1;; ++across) {
      columns = across == 1 ? p.width : round_up(ceil_div(p.width, across), kN);
      pitch = margin + round_up(columns, kN) + round_up(larger(reach, 1), kN);
      const int64_t border = 2 * reach * packed_planes * pitch;
      const int64_t row = packed_planes * pitch + bare_planes * round_up(columns, kN);
      rows = (kTileBytes / int64_t(sizeof(S)) - border) / row;
      if (rows >= smaller(p.height, 8 + 2 * reach) || columns <= 4 * kN) break;
    }
    across = ceil_div(p.width, columns);
    rows = smaller(larger(rows, 2), p.height);
    down = ceil_div(p.height, rows);
    rows = ceil_div(p.height, down);
    down = ceil_div(p.height, rows);
    plane = round_up((rows + 2 * reach) * pitch, 2 * kN) + kN;
  }

  int64_t tiles(const Problem& p) const { return p.batch * down * across; }

  // Images of a batch are neighbours, so that one group can own a pixel of all of them.
  Tile tile(const Problem& p, int64_t index) const {
    const int64_t b = index % p.batch, place = index / p.batch;
    const int64_t y = place / across * rows, x = place % across * columns;
    return {b, y, x, smaller(rows, p.height - y), smaller(columns, p.width - x)};
  }
};

// Vectors of a tile's row, cut into blocks of nearly equal width.
struct Blocks {
  int64_t vectors, count;
  explicit Blocks(int64_t all) : vectors(all), count(ceil_div(all, kMaxVectors)) {}
  int64_t first(int64_t i) const { return i * vectors / count; }
};

template <class S>
struct Taps {
  int64_t count;
  int32_t* offsets;  // within a packed plane, from the pixel

  // sign -1: taps of the flipped kernel.
  Taps(const Problem& p, int64_t pitch, int sign)
      : count(p.kernel * p.kernel),
        offsets(static_cast<int32_t*>(malloc(sizeof(int32_t) * count))) {
    if (!offsets) abort();
    const int64_t half = p.kernel / 2;
    for (int64_t tap = 0; tap < count; ++tap)
      offsets[tap] = int32_t(sign * p.dilation *
                             ((tap / p.kernel - half) * pitch + tap % p.kernel - half));
  }
  ~Taps() { free(offsets); }
  Taps(const Taps&) = delete;
};

// Copies one plane of a tile with its border; what lies outside of the image is zero.
template <class S, class N>
void pack_plane(const Problem& p, const Tiling<S>& tiling, const Tile& tile, const N* src,
                int64_t stride_y, int64_t stride_x, S* dst) {
  const int64_t reach = tiling.reach;
  const int64_t left = larger(tile.x - reach, 0);
  const int64_t right = smaller(tile.x + tile.columns + reach, p.width);
  const int64_t before = tiling.margin - (tile.x - left);
  for (int64_t y = tile.y - reach; y < tile.y + tile.rows + reach; ++y) {
    if (y < 0 || y >= p.height) {
      memset(dst, 0, tiling.pitch * sizeof(S));
      dst += tiling.pitch;
      continue;
    }
    const N* row = src + y * stride_y + left * stride_x;
    for (int64_t x = 0; x < before; ++x) dst[x] = 0;
    S* to = dst + before;
    const int64_t count = right - left;
    if (stride_x == 1) {
      if constexpr (sizeof(N) == sizeof(S)) {
        memcpy(to, row, count * sizeof(S));
      } else {
        for (int64_t x = 0; x < count; x += kLanes<S>) {
          if (count - x >= kLanes<S>) {
            store(to + x, load_wide<S>(row + x));
          } else {
            for (int64_t i = x; i < count; ++i) to[i] = widen(row[i]);
          }
        }
      }
    } else {
      for (int64_t x = 0; x < count; ++x) to[x] = widen(row[x * stride_x]);
    }
    for (int64_t x = before + count; x < tiling.pitch; ++x) dst[x] = 0;
    dst += tiling.pitch;
  }
}

// ------------------------------------------------------------------ what both directions share

template <class S, class N>
struct Common {
  static constexpr int kN = kLanes<S>;
  const Problem& p;
  const int64_t pixels;  // of one image

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
    return static_cast<N*>(p.gates) +
           (((b * p.steps + t) * 4 + gate) * p.hidden + m) * pixels;
  }

  // x_t and h_{t-1}; returns how many planes.
  int64_t pack_inputs(const Tiling<S>& tiling, const Tile& tile, int64_t t, S* dst) const {
    const N* x = static_cast<const N*>(p.x.data) + tile.b * p.x.b + t * p.x.t;
    for (int64_t c = 0; c < p.channels; ++c)
      pack_plane(p, tiling, tile, x + c * p.x.c, p.x.y, p.x.x, dst + c * tiling.plane);
    if (!hidden_plane(t, tile.b, 0)) return p.channels;
    for (int64_t m = 0; m < p.hidden; ++m)
      pack_plane(p, tiling, tile, hidden_plane(t, tile.b, m), p.width, 1,
                 dst + (p.channels + m) * tiling.plane);
    return p.channels + p.hidden;
  }

  // weights[m][plane][tap][gate]
  void pack_forward_weights() const {
    const int64_t taps = p.kernel * p.kernel, planes = p.channels + p.hidden;
    S* to = static_cast<S*>(p.weights);
    for (int64_t m = 0; m < p.hidden; ++m)
      for (int64_t plane = 0; plane < planes; ++plane)
        for (int64_t tap = 0; tap < taps; ++tap)
          for (int64_t gate = 0; gate < 4; ++gate)
            *to++ = weight(gate * p.hidden + m, plane, tap, taps);
  }
  S weight(int64_t g, int64_t plane, int64_t tap, int64_t taps) const {
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
    const N* weights = static_cast<const N*>(p.peephole) + row * p.hidden * (p.full_peephole ? pixels : 1);
    if (!p.full_peephole) return broadcast<S>(widen(weights[m]));
    return load_first<S>(weights + m * pixels + pixel, count);
  }
};

template <class S>
int64_t forward_weights(const Problem& p) {
  return 4 * p.hidden * (p.channels + p.hidden) * p.kernel * p.kernel;
}

// ------------------------------------------------------------------ forward

template <class S, class N>
struct Forward : Common<S, N> {
  using Base = Common<S, N>;
  using Base::kN;
  using Base::p;

  Tiling<S> tiling;
  Taps<S> taps;
  int64_t t = 0;
  Counter tasks;

  explicit Forward(const Problem& problem)
      : Base(problem), tiling(problem, problem.channels + problem.hidden, 0),
        taps(problem, tiling.pitch, 1) {}

  void run(const Tile& tile) {
    const int64_t all_planes = p.channels + p.hidden;
    const int64_t elements = all_planes * tiling.plane + kOutputs * kMaxVectors * kN;
    Scratch scratch(thread_scratch(Scratch::bytes<S>(elements)));
    S* packed = scratch.piece<S>(elements);
    S* sums = packed + all_planes * tiling.plane;
    const int64_t planes = this->pack_inputs(tiling, tile, t, packed);
    const Blocks blocks(ceil_div(tile.columns, kN));
    const int64_t per_channel = all_planes * taps.count * kOutputs;
    for (int64_t m = 0; m < p.hidden; ++m) {
      const S* weights = static_cast<const S*>(p.weights) + m * per_channel;
      for (int64_t y = 0; y < tile.rows; ++y)
        for (int64_t i = 0; i < blocks.count; ++i) {
          const int64_t first = blocks.first(i), vectors = blocks.first(i + 1) - first;
          const S* in = packed + (y + tiling.reach) * tiling.pitch + tiling.margin + first * kN;
          conv<S>(int(vectors), in, tiling.plane, planes, taps.offsets, taps.count, weights, sums);
          const int64_t column = first * kN;
          finish(tile.b, m, (tile.y + y) * p.width + tile.x + column, vectors,
                 tile.columns - column, sums);
        }
    }
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
      const Vec<S> new_c = (q_f.over * c * under + q_i.over * q_g.over * q_f.under) /
                           (under * q_f.under);
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

template <class S, class N>
void forward(const Problem& p, Parallel parallel) {
  using Run = Forward<S, N>;
  Run state(p);
  state.pack_forward_weights();
  for (state.t = 0; state.t < p.steps; ++state.t) {
    state.tasks.next = 0;
    parallel(
        [](void* context) {
          Run& run = *static_cast<Run*>(context);
          const int64_t tiles = run.tiling.tiles(run.p);
          for (int64_t i; (i = run.tasks.take()) < tiles;) run.run(run.tiling.tile(run.p, i));
        },
        &state);
  }
}

// ------------------------------------------------------------------ backward

// Gate lanes of the weight gradient: whole vectors, and pairs of them where there is more than one.
template <class S>
int64_t gate_lanes(const Problem& p) {
  const int64_t lanes = round_up(4 * p.hidden, kLanes<S>);
  return lanes == kLanes<S> ? lanes : round_up(lanes, 2 * kLanes<S>);
}

// What one group sums: dW [panel][plane][tap][panel lanes], db [lanes], dpeephole [3][M][vector].
template <class S>
int64_t group_sums(const Problem& p) {
  const int64_t planes = p.channels + p.hidden, lanes = gate_lanes<S>(p);
  return lanes * planes * p.kernel * p.kernel + lanes + 3 * p.hidden * kLanes<S>;
}

template <class S>
int64_t backward_weights(const Problem& p) {
  const int64_t outputs = round_up(p.hidden, kOutputs) + round_up(p.channels, kOutputs);
  return outputs * 4 * p.hidden * p.kernel * p.kernel;
}

// Not a multiple of 4096 bytes: planes of images of a power-of-two size share one cache set.
template <class S>
int64_t dgates_plane(const Problem& p) {
  return round_up(p.height * p.width, kLanes<S>) + 5 * kLanes<S>;
}

template <class S>
int64_t dgates_elements(const Problem& p) {
  return p.batch * 4 * p.hidden * dgates_plane<S>(p);
}

template <class S>
Tiling<S> backward_tiling(const Problem& p) {
  const int64_t inputs = p.channels + p.hidden, gates = 4 * p.hidden;
  return Tiling<S>(p, p.gates ? larger(inputs, gates) : inputs + gates,
                   p.gates ? gates : 2 * gates);
}

template <class S>
int64_t groups(const Problem& p) {
  const Tiling<S> tiling = backward_tiling<S>(p);
  const int64_t tiles = p.full_peephole ? tiling.down * tiling.across : tiling.tiles(p);
  const int64_t fit = kSumBytes / (group_sums<S>(p) * int64_t(sizeof(S)));
  return smaller(tiles, smaller(larger(fit, kFewestGroups), kMostGroups));
}

template <class S, class N>
struct Backward : Common<S, N> {
  using Base = Common<S, N>;
  using Base::kN;
  using Base::p;

  Tiling<S> tiling;
  Taps<S> taps, flipped;
  int64_t t = 0;
  Counter tasks;
  const int64_t gates, lanes, panel_lanes;
  const int64_t hidden_blocks, channel_blocks;
  const bool need_weights, need_sums, sum_peephole;

  explicit Backward(const Problem& problem)
      : Base(problem), tiling(backward_tiling<S>(problem)), taps(problem, tiling.pitch, 1),
        flipped(problem, tiling.pitch, -1), gates(4 * problem.hidden),
        lanes(gate_lanes<S>(problem)), panel_lanes(smaller(lanes, 2 * kN)),
        hidden_blocks(ceil_div(problem.hidden, kOutputs)),
        channel_blocks(ceil_div(problem.channels, kOutputs)),
        need_weights(problem.dweight_ih || problem.dweight_hh), need_sums(need_weights || problem.dbias),
        sum_peephole(problem.dpeephole && !problem.full_peephole) {}

  // weights[block of outputs][gate plane][tap][output]: first blocks of h, then blocks of x.
  void pack_backward_weights() const {
    S* to = static_cast<S*>(p.backward_weights);
    for (int64_t block = 0; block < hidden_blocks + channel_blocks; ++block) {
      const bool of_h = block < hidden_blocks;
      const int64_t first = (of_h ? block : block - hidden_blocks) * kOutputs;
      const int64_t end = of_h ? p.hidden : p.channels;
      for (int64_t g = 0; g < gates; ++g)
        for (int64_t tap = 0; tap < taps.count; ++tap)
          for (int64_t j = first; j < first + kOutputs; ++j)
            *to++ = j < end ? this->weight(g, of_h ? p.channels + j : j, tap, taps.count) : S(0);
    }
  }

  S* dgate_plane(int64_t step, int64_t b, int64_t g) const {
    return static_cast<S*>(p.dgates[step & 1]) + (b * gates + g) * dgates_plane<S>(p);
  }

  struct Places {
    S *packed, *transposed, *scratch_gates, *sums, *peephole_sums;
  };

  // Step t: dx[t + 1] and dh[t] from dgates[t + 1]; dgates[t], dc; weight gradients of step t.
  // Step -1: dx[0] and the gradient of the initial h.
  void run(const Tile& tile, S* group) {
    // Planes of x and h are packed once where they are needed before and after those of dgates.
    const int64_t inputs = p.channels + p.hidden;
    const int64_t packed_planes = p.gates ? larger(inputs, gates) : inputs + gates;
    const int64_t vectors = ceil_div(tiling.columns, kN);
    const int64_t bare = tiling.rows * vectors * kN;
    const int64_t peephole_sums = sum_peephole ? 3 * p.hidden * kN : 0;
    const int64_t counts[] = {packed_planes * tiling.plane, lanes * bare,
                              p.gates ? 0 : gates * bare, kOutputs * kMaxVectors * kN,
                              peephole_sums};
    int64_t bytes = 0;
    for (int64_t count : counts) bytes += Scratch::bytes<S>(count);
    Scratch scratch(thread_scratch(bytes));
    Places at;
    at.packed = scratch.piece<S>(counts[0]);
    S* packed_dgates = at.packed + (p.gates ? 0 : inputs * tiling.plane);
    at.transposed = scratch.piece<S>(counts[1]);
    at.scratch_gates = scratch.piece<S>(counts[2]);
    at.sums = scratch.piece<S>(counts[3]);
    at.peephole_sums = scratch.piece<S>(counts[4]);
    memset(at.peephole_sums, 0, peephole_sums * sizeof(S));

    const Blocks blocks(ceil_div(tile.columns, kN));
    int64_t planes = 0;
    if (t >= 0 && !p.gates) {
      planes = this->pack_inputs(tiling, tile, t, at.packed);
      recompute_gates(tile, blocks, planes, at);
    }
    const bool last = t == p.steps - 1;
    if (!last)
      for (int64_t g = 0; g < gates; ++g)
        pack_plane(p, tiling, tile, dgate_plane(t + 1, tile.b, g), p.width, 1,
                   packed_dgates + g * tiling.plane);
    const int64_t per_block = gates * taps.count * kOutputs;
    const int64_t end_block = hidden_blocks + (p.dx && !last ? channel_blocks : 0);
    for (int64_t block = t < 0 && !p.dh ? hidden_blocks : 0; block < end_block; ++block) {
      const bool of_h = block < hidden_blocks;
      const int64_t first_output = (of_h ? block : block - hidden_blocks) * kOutputs;
      const int64_t outputs = smaller(kOutputs, (of_h ? p.hidden : p.channels) - first_output);
      const S* weights = static_cast<const S*>(p.backward_weights) + block * per_block;
      for (int64_t y = 0; y < tile.rows; ++y)
        for (int64_t i = 0; i < blocks.count; ++i) {
          const int64_t first = blocks.first(i), width = blocks.first(i + 1) - first;
          const int64_t column = first * kN, count = tile.columns - column;
          const int64_t pixel = (tile.y + y) * p.width + tile.x + column;
          const S* in =
              packed_dgates + (y + tiling.reach) * tiling.pitch + tiling.margin + column;
          if (!last)
            conv<S>(int(width), in, tiling.plane, gates, flipped.offsets, taps.count, weights,
                    at.sums);
          for (int64_t j = 0; j < outputs; ++j) {
            const S* sums = last ? nullptr : at.sums + j * kMaxVectors * kN;
            const int64_t m = first_output + j;
            if (!of_h) {
              N* dx = static_cast<N*>(p.dx) +
                      ((tile.b * p.steps + t + 1) * p.channels + m) * this->pixels;
              write(dx + pixel, sums, width, count);
            } else if (t < 0) {
              write(static_cast<N*>(p.dh) + (tile.b * p.hidden + m) * this->pixels + pixel, sums,
                    width, count);
            } else {
              const int64_t bare_at = y * vectors * kN + column;
              gate_gradients(tile, m, y, column, pixel, width, count, sums,
                             p.gates ? nullptr : at.scratch_gates + bare_at, bare, at.peephole_sums);
            }
          }
        }
    }
    if (t < 0) return;
    S* peephole_total = group + group_sums<S>(p) - 3 * p.hidden * kN;
    for (int64_t i = 0; i < peephole_sums; ++i) peephole_total[i] += at.peephole_sums[i];
    if (!need_sums) return;
    transpose_dgates(tile, at.transposed, group);
    if (!need_weights) return;
    if (p.gates) planes = this->pack_inputs(tiling, tile, t, at.packed);
    weight_gradients(tile, planes, at, group);
  }

  static VSOD_INLINE void write(N* dst, const S* sums, int64_t vectors, int64_t count) {
    for (int64_t v = 0; v < vectors; ++v)
      store_first<S>(dst + v * kN, load(sums + v * kN), count - v * kN);
  }

  // scratch_gates[gate * M + m][y][x], the gates of step t again.
  void recompute_gates(const Tile& tile, const Blocks& blocks, int64_t planes, const Places& at) {
    const int64_t stride = ceil_div(tiling.columns, kN) * kN;
    const int64_t bare = tiling.rows * stride;
    const int64_t per_channel = (p.channels + p.hidden) * taps.count * kOutputs;
    for (int64_t m = 0; m < p.hidden; ++m) {
      const S* before = this->cell_before(t, tile.b, m);
      const S* after = this->cell_plane(t + 1, tile.b, m);
      const S* weights = static_cast<const S*>(p.weights) + m * per_channel;
      for (int64_t y = 0; y < tile.rows; ++y)
        for (int64_t i = 0; i < blocks.count; ++i) {
          const int64_t first = blocks.first(i), vectors = blocks.first(i + 1) - first;
          const S* in =
              at.packed + (y + tiling.reach) * tiling.pitch + tiling.margin + first * kN;
          conv<S>(int(vectors), in, tiling.plane, planes, taps.offsets, taps.count, weights,
                  at.sums);
          for (int64_t v = 0; v < vectors; ++v) {
            const int64_t column = (first + v) * kN, count = tile.columns - column;
            const int64_t pixel = (tile.y + y) * p.width + tile.x + column;
            const S* sums = at.sums + v * kN;
            Vec<S> gate[4];
            for (int j = 0; j < 4; ++j)
              gate[j] = load(sums + j * kMaxVectors * kN) + this->bias(j, m);
            if (p.peephole) {
              const Vec<S> c = before ? load_first<S>(before + pixel, count) : Vec<S>{};
              gate[0] += this->peephole(0, m, pixel, count) * c;
              gate[1] += this->peephole(1, m, pixel, count) * c;
              gate[3] += this->peephole(2, m, pixel, count) * load_first<S>(after + pixel, count);
            }
            S* to = at.scratch_gates + m * bare + y * stride + column;
            store(to, sigmoid(gate[0]).value());
            store(to + p.hidden * bare, sigmoid(gate[1]).value());
            store(to + 2 * p.hidden * bare, tanh_of(gate[2]).value());
            store(to + 3 * p.hidden * bare, sigmoid(gate[3]).value());
          }
        }
    }
  }

  // dgates[t] and dc of one channel and `count` pixels, at most `vectors` vectors of them.
  VSOD_INLINE void gate_gradients(const Tile& tile, int64_t m, int64_t y, int64_t column,
                                  int64_t pixel, int64_t vectors, int64_t count, const S* dh_sums,
                                  const S* scratch_gates, int64_t bare, S* peephole_sums) const {
    const int64_t b = tile.b;
    const S* before = this->cell_before(t, b, m);
    const S* after = this->cell_plane(t + 1, b, m);
    S* dc_plane = static_cast<S*>(p.dc) + (b * p.hidden + m) * this->pixels;
    const Frames& grad = p.grad_out;
    const N* grad_row = nullptr;
    if (grad.data)
      grad_row = static_cast<const N*>(grad.data) + b * grad.b + t * grad.t + m * grad.c +
                 (tile.y + y) * grad.y + (tile.x + column) * grad.x;
    for (int64_t v = 0; v < vectors; ++v, pixel += kN, count -= kN) {
      Vec<S> i, f, g, o;
      if (scratch_gates) {
        const S* at = scratch_gates + m * bare + v * kN;
        i = load(at), f = load(at + p.hidden * bare);
        g = load(at + 2 * p.hidden * bare), o = load(at + 3 * p.hidden * bare);
      } else {
        i = load_first<S>(this->gate_plane(t, b, 0, m) + pixel, count);
        f = load_first<S>(this->gate_plane(t, b, 1, m) + pixel, count);
        g = load_first<S>(this->gate_plane(t, b, 2, m) + pixel, count);
        o = load_first<S>(this->gate_plane(t, b, 3, m) + pixel, count);
      }
      const Vec<S> c = before ? load_first<S>(before + pixel, count) : Vec<S>{};
      const Vec<S> new_c = load_first<S>(after + pixel, count);
      Vec<S> dh = dh_sums ? load(dh_sums + v * kN) : Vec<S>{};
      if (grad_row) {
        if (grad.x == 1) {
          dh += load_first<S>(grad_row + v * kN, count);
        } else {
          for (int k = 0; k < kN && k < count; ++k)
            dh[k] += S(widen(grad_row[(v * kN + k) * grad.x]));
        }
      }
      const Vec<S> tanh_c = tanh_of(new_c).value();
      const Vec<S> d_o = dh * tanh_c * o * (S(1) - o);
      Vec<S> dc = load_first<S>(dc_plane + pixel, count) + dh * o * (S(1) - tanh_c * tanh_c);
      if (p.peephole) dc += this->peephole(2, m, pixel, count) * d_o;
      const Vec<S> di = dc * g * i * (S(1) - i);
      const Vec<S> df = dc * c * f * (S(1) - f);
      const Vec<S> dg = dc * i * (S(1) - g * g);
      dc *= f;
      if (p.peephole) {
        dc += this->peephole(0, m, pixel, count) * di + this->peephole(1, m, pixel, count) * df;
        if (p.dpeephole) add_peephole(m, pixel, count, di * c, df * c, d_o * new_c, peephole_sums);
      }
      store_first<S>(dc_plane + pixel, dc, count);
      store_first<S>(dgate_plane(t, b, m) + pixel, di, count);
      store_first<S>(dgate_plane(t, b, p.hidden + m) + pixel, df, count);
      store_first<S>(dgate_plane(t, b, 2 * p.hidden + m) + pixel, dg, count);
      store_first<S>(dgate_plane(t, b, 3 * p.hidden + m) + pixel, d_o, count);
    }
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

  // transposed[panel][pixel of the tile][panel lanes] from dgates[t], and its sum over pixels.
  void transpose_dgates(const Tile& tile, S* transposed, S* group) const {
    S* bias_sums = group + group_sums<S>(p) - 3 * p.hidden * kN - lanes;
    const int64_t tile_pixels = tile.rows * tile.columns;
    for (int64_t first = 0; first < lanes; first += kN) {
      S* panel = transposed + first / panel_lanes * panel_lanes * tile_pixels + first % panel_lanes;
      Vec<S> sum = {};
      for (int64_t y = 0; y < tile.rows; ++y)
        for (int64_t x = 0; x < tile.columns; x += kN) {
          const int64_t count = smaller(kN, tile.columns - x);
          const int64_t pixel = (tile.y + y) * p.width + tile.x + x;
          Vec<S> square[kN] = {};
#pragma GCC unroll 16
          for (int j = 0; j < kN; ++j)
            if (first + j < gates)
              square[j] = load_first<S>(dgate_plane(t, tile.b, first + j) + pixel, count);
          transpose_square<S>(square);
          S* to = panel + (y * tile.columns + x) * panel_lanes;
          if (count == kN) {
#pragma GCC unroll 16
            for (int j = 0; j < kN; ++j) {
              sum += square[j];
              store(to + j * panel_lanes, square[j]);
            }
          } else {
            for (int j = 0; j < count; ++j) {
              sum += square[j];
              store(to + j * panel_lanes, square[j]);
            }
          }
        }
      store(bias_sums + first, load(bias_sums + first) + sum);
    }
  }

  void weight_gradients(const Tile& tile, int64_t planes, const Places& at, S* group) const {
    const int64_t tile_pixels = tile.rows * tile.columns;
    const int64_t columns = smaller(tile.columns, kDepthPixels);
    const int64_t rows = larger(1, kDepthPixels / tile.columns);
    const int64_t sum_stride = taps.count * panel_lanes;
    for (int64_t y = 0; y < tile.rows; y += rows)
      for (int64_t x = 0; x < tile.columns; x += columns) {
        Depth depth{smaller(rows, tile.rows - y), smaller(columns, tile.columns - x), 0, 0};
        depth.a_row = tiling.pitch - depth.columns;
        depth.b_row = (tile.columns - depth.columns) * panel_lanes;
        const S* origin =
            at.packed + (y + tiling.reach) * tiling.pitch + tiling.margin + x;
        for (int64_t panel = 0; panel < lanes; panel += panel_lanes) {
          const S* b = at.transposed + panel * tile_pixels +
                       (y * tile.columns + x) * panel_lanes;
          S* panel_sums = group + panel * (p.channels + p.hidden) * taps.count;
          for (int64_t plane = 0; plane < planes; plane += kWeightRows) {
            const int64_t some = smaller(kWeightRows, planes - plane);
            for (int64_t tap = 0; tap < taps.count; ++tap) {
              const S* a = origin + plane * tiling.plane + taps.offsets[tap];
              S* sums = panel_sums + plane * sum_stride + tap * panel_lanes;
              if (panel_lanes == kN)
                weight_rows<S, 1>(some, a, tiling.plane, b, kN, depth, sums, sum_stride);
              else
                weight_rows<S, 2>(some, a, tiling.plane, b, 2 * kN, depth, sums, sum_stride);
            }
          }
        }
      }
  }

  // Adds the groups, in order.  One task is one gate.
  void reduce(int64_t g) const {
    const int64_t planes = p.channels + p.hidden, size = group_sums<S>(p);
    const S* sums = static_cast<const S*>(p.sums);
    const int64_t panel = g / panel_lanes * panel_lanes;
    const S* of_gate = sums + panel * planes * taps.count + g % panel_lanes;
    for (int64_t plane = 0; plane < planes; ++plane) {
      const bool of_x = plane < p.channels;
      S* to = static_cast<S*>(of_x ? p.dweight_ih : p.dweight_hh);
      if (!to) continue;
      to += (of_x ? g * p.channels + plane : g * p.hidden + plane - p.channels) * taps.count;
      for (int64_t tap = 0; tap < taps.count; ++tap)
        to[tap] = total(of_gate + (plane * taps.count + tap) * panel_lanes, size);
    }
    const S* rest = sums + lanes * planes * taps.count;
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

template <class S, class N>
void backward(const Problem& p, Parallel parallel) {
  using Run = Backward<S, N>;
  Run state(p);
  if (!p.gates) state.pack_forward_weights();
  state.pack_backward_weights();
  const int64_t end = p.dx || p.dh ? -1 : 0;
  for (state.t = p.steps - 1; state.t >= end; --state.t) {
    state.tasks.next = 0;
    parallel(
        [](void* context) {
          Run& run = *static_cast<Run*>(context);
          const Problem& p = run.p;
          // Whole pixels a group where each pixel has a weight of its own.
          const int64_t unit = p.full_peephole ? p.batch : 1;
          const int64_t units = run.tiling.tiles(p) / unit;
          for (int64_t group; (group = run.tasks.take()) < p.groups;) {
            S* sums = static_cast<S*>(p.sums) + group * group_sums<S>(p);
            const int64_t last = (group + 1) * units / p.groups * unit;
            for (int64_t i = group * units / p.groups * unit; i < last; ++i)
              run.run(run.tiling.tile(p, i), sums);
          }
        },
        &state);
  }
  state.tasks.next = 0;
  parallel(
      [](void* context) {
        Run& run = *static_cast<Run*>(context);
        for (int64_t g; (g = run.tasks.take()) < run.gates;) run.reduce(g);
      },
      &state);
}

template <class S>
void activate(const void* x, void* sigmoids, void* tanhs, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<S>) {
    const Vec<S> v = load_first<S>(static_cast<const S*>(x) + i, count - i);
    store_first<S>(static_cast<S*>(sigmoids) + i, sigmoid(v).value(), count - i);
    store_first<S>(static_cast<S*>(tanhs) + i, tanh_of(v).value(), count - i);
  }
}

template <class S, class N>
constexpr Kernel kernel() {
  return {forward_weights<S>, backward_weights<S>, dgates_elements<S>, group_sums<S>,
          groups<S>,          forward<S, N>,       backward<S, N>,     activate<S>};
}

}  // namespace

#if defined(__AVX512BF16__)
extern const Kernel conv_lstm_bfloat16_kernel;
constexpr Kernel conv_lstm_bfloat16_kernel = kernel<float, BFloat16>();
#else
extern const Kernel conv_lstm_kernels[kDtypeCount];
constexpr Kernel conv_lstm_kernels[kDtypeCount] = {
    kernel<float, float>(),
    kernel<double, double>(),
    kernel<float, Float16>(),
    kernel<float, BFloat16>(),
};
#endif

}  // namespace VSOD_LEVEL
}  // namespace vsod
