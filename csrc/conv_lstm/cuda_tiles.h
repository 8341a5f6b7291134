// The CUDA kernels of conv_lstm for few channels, as phases: functions called once per thread, with
// barriers only between phases.  cuda.cu calls them with __syncthreads() between; cuda_on_host.cpp
// calls each for every thread of a block in a loop, so that indexing, halo, borders and reductions
// are tested on machines without a GPU.  One kernel is one struct:
//
//   cuda_forward.h   ForwardKernel       gates, c_t and h_t of one step, or the gates of several
//                                        steps again
//   cuda_backward.h  StepBackwardKernel  dh_t gathered from the gate gradients of step t+1, then
//                                        those of step t
//                    GatherKernel        dx of several steps, or dh_0
//   cuda_weights.h   WeightKernel        dW_ih, dW_hh and db of several steps, as one partial sum
//                                        a block
//                    PeepholeKernel      dpeephole of several steps, the same way
//                    ReduceKernel        the sum of the partial sums, in a fixed order: no atomics
//                                        anywhere
// Here: what they share, tensors of several steps and the convolution on tiles.
//
// Convolutions: a block of 128 threads owns a tile of 32 x 16 pixels (forward) or 32 x 32 (gather).
// Input channels pass through shared memory in chunks of 8, as float32 with their halo, beside the
// weights of the chunk.  A lane owns one column, a warp 4 (8) rows of it, and a thread keeps the
// sums of its pixels for 16 outputs (four gates of 4 hidden channels) or 4 or 8 (gather) in
// registers: 64 (32, 64) of them.  Why so: with T = 4 and 4 -> 4 channels in float32 a step moves
// 80 bytes a pixel and does 1152 multiply-adds, so on a chip with 16 float32 FMA a byte the
// arithmetic weighs more than the bytes, and what counts is how few instructions stand beside the
// FMA.  Per channel a thread does 9 x 64 FMA; the compiler keeps the 6 x 3 inputs of its column in
// registers (18 loads without bank conflicts), and a weight is a broadcast of 16 bytes (36 loads):
// 144 cycles of FMA beside 54 of shared memory.  The halo costs 20 % (13 %) more loads.
// Shared memory: 8 x 18 x 34 x 4 + 8 x 9 x 16 x 4 = 24,192 bytes forward, 36,992 + 1,152 (2,304)
// gather.  At 128 registers 4 blocks fill the register file, so 97 of 227 KB are used.
//
// Any odd kernel and any dilation: where the tile with its halo and one channel does not fit 48 KB,
// a stage holds one tap (its shifted tile) instead of all.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "../common/host_device.h"

namespace vsod {
namespace conv_lstm_cuda {

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTileX = kWarp;            // pixels: one a lane
constexpr int kChunk = 8;                // input channels that are in shared memory at a time
constexpr int kSharedBytes = 48 * 1024;  // what a block gets on every GPU without asking

// The dtype of sums and of the cell state beside tensors of N.
template <class N>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

template <class S>
struct alignas(4 * sizeof(S)) Four {
  S v[4];
};

template <class N>
struct alignas(8 * sizeof(N)) Eight {
  N v[8];
};

struct Shape {
  int64_t batch, steps, channels, hidden, height, width;
  int kernel, dilation;

  VSOD_BOTH int64_t pixels() const { return height * width; }
  VSOD_BOTH int taps() const { return kernel * kernel; }
  VSOD_BOTH int reach() const { return dilation * (kernel / 2); }
};

// (B, T, channels, H, W) with any strides, in elements.
template <class N>
struct Frames {
  const N* data;
  int64_t b, t, c, y, x;
};

// `count` channels of one frame; data may be null where count is 0.
template <class N>
struct Planes {
  const N* data;
  int64_t c, y, x;
  int count;
};

// What a convolution reads: the channels of `first`, then those of `second`.
template <class N>
struct Input {
  Planes<N> first, second;

  VSOD_BOTH int channels() const { return first.count + second.count; }
};

// ---- sigmoid and tanh, right from -inf to inf; NaN stays NaN ------------------------------------

VSOD_BOTH double sigmoid(double x) { return 1 / (1 + exp(-x)); }
VSOD_BOTH float sigmoid(float x) {
  // exp(-x) may be inf: 1 / inf is the right 0.
#if defined(__CUDA_ARCH__)
  return __fdividef(1.0f, 1.0f + expf(-x));
#else
  return 1.0f / (1.0f + expf(-x));
#endif
}
VSOD_BOTH double tanh_of(double x) { return tanh(x); }
VSOD_BOTH float tanh_of(float x) { return tanhf(x); }

// ---- tensor cores -------------------------------------------------------------------------------

template <class N>
inline constexpr bool kTensorCores = sizeof(N) == 2;

// Two numbers side by side; the first is the lower half.
template <class N>
VSOD_BOTH uint32_t read_pair(const N* from) {
  return *reinterpret_cast<const uint32_t*>(from);
}

// d (16 x 8) += a (16 x 16) b (16 x 8) by one warp, sums in float32.  a(lane, 0..3) and
// b(lane, 0..1) are pairs along the inner dimension.  With group = lane / 4, t = lane % 4:
//   a(lane, r): row group + 8 (r % 2), inner 2t, 2t + 1, plus 8 where r >= 2
//   b(lane, r): column group, inner 2t, 2t + 1, plus 8 r
//   d[i]:       row group + 8 (i / 2), column 2t + i % 2
// On the CPU a lane fetches what the other lanes would hold.
template <class N, class A, class B>
VSOD_BOTH void multiply_add_16x8x16(int lane, const A& a, const B& b, float (&d)[4]) {
#if defined(__CUDA_ARCH__)
  const uint32_t a0 = a(lane, 0), a1 = a(lane, 1), a2 = a(lane, 2), a3 = a(lane, 3);
  const uint32_t b0 = b(lane, 0), b1 = b(lane, 1);
  if constexpr (std::is_same_v<N, c10::Half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  const auto half = [](uint32_t pair, int which) {
    const uint16_t bits = uint16_t(pair >> (16 * which));
    N number;
    memcpy(&number, &bits, sizeof(bits));
    return float(number);
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k)
      d[i] += half(a(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2), k % 2) *
              half(b(column * 4 + k % 8 / 2, k / 8), k % 2);
  }
#endif
}

// One operand of several products, read once: on the GPU each lane holds its pairs.
template <int kPairs, class Pairs>
struct Held {
  const Pairs& pairs;
  uint32_t own[kPairs];

  VSOD_BOTH Held(int lane, const Pairs& from) : pairs(from) {
    VSOD_UNROLL
    for (int r = 0; r < kPairs; ++r) own[r] = from(lane, r);
  }
  VSOD_BOTH uint32_t operator()(int lane, int r) const {
#if defined(__CUDA_ARCH__)
    return own[r];
#else
    return pairs(lane, r);
#endif
  }
};

// ---- which frame, tile and group of output channels a block owns --------------------------------

struct Grid {
  uint32_t frames, tiles_y, tiles_x, groups;  // groups change fastest: they share a tile in the L2

  int64_t blocks() const { return int64_t(frames) * tiles_y * tiles_x * groups; }
};

struct Place {
  int64_t frame, y, x;  // y, x: the first pixel of the tile
  int group;
};

VSOD_BOTH Place place(const Grid& grid, uint32_t index, int tile_y) {
  Place at;
  at.group = int(index % grid.groups);
  index /= grid.groups;
  at.x = int64_t(index % grid.tiles_x) * kTileX;
  index /= grid.tiles_x;
  at.y = int64_t(index % grid.tiles_y) * tile_y;
  at.frame = index / grid.tiles_y;
  return at;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Grid make_grid(const Shape& shape, int64_t frames, int tile_y, int64_t groups) {
  return {uint32_t(frames), uint32_t(ceil_div(shape.height, tile_y)),
          uint32_t(ceil_div(shape.width, kTileX)), uint32_t(groups)};
}

// ---- convolution --------------------------------------------------------------------------------

// Eight channels of one pixel, from c0 on; zeros outside the frame and from channel c0 + count on.
// All loads come first, so that they are in flight together.
template <class N, class To>
VSOD_BOTH void load_channels(const Input<N>& input, const Shape& shape, int c0, int count,
                             int64_t y, int64_t x, To (&values)[kChunk]) {
  const bool inside = y >= 0 && y < shape.height && x >= 0 && x < shape.width;
  const int left = input.first.count - c0;  // channels of `first` from c0 on
  const N* second = input.second.data + y * input.second.y + x * input.second.x;
  const N* first = input.first.data + y * input.first.y + x * input.first.x;
  const N* source = left > 0 ? first + c0 * input.first.c : second - left * input.second.c;
  VSOD_UNROLL
  for (int c = 0; c < kChunk; ++c) {
    values[c] = inside && c < count ? To(*source) : To(0.0f);
    source = c + 1 == left ? second : source + (c < left ? input.first.c : input.second.c);
  }
}

// One stage of a convolution: `chunk` channels and `taps` taps, their inputs and weights in shared
// memory.
struct Stages {
  int chunk, taps, rows, cols;  // rows, cols: of the tile in shared memory
};

// What most people use gets kernels with everything known at compile time.
VSOD_BOTH bool is_fast(const Shape& shape) { return shape.kernel == 3 && shape.dilation == 1; }

// Sums of kRows x 32 pixels a warp for kOutputs outputs, by float32 multiply-adds: a lane owns a
// column.
template <class N, bool kFast, int kRows, int kOutputs>
struct FmaTile {
  using S = typename Wide<N>::type;
  struct Registers {
    S sum[kRows][kOutputs] = {};
  };

  // Numbers of S.  Tile (chunk, rows, cols), then weights (chunk, taps, kOutputs).
  VSOD_BOTH static int64_t tile_numbers(int64_t chunk, int64_t rows, int64_t cols) {
    return (chunk * rows * cols + 3) / 4 * 4;
  }
  VSOD_BOTH static int64_t weight_numbers(int64_t chunk, int64_t taps) {
    return chunk * taps * kOutputs;
  }

  // Phase: `count` channels of the input from c0 on, rows from y0 and columns from x0 on.
  VSOD_BOTH static void fill_tile(int thread, const Input<N>& input, const Shape& shape, int c0,
                                  int count, int rows, int cols, int64_t y0, int64_t x0, S* tile) {
    VSOD_ROLLED
    for (int i = thread; i < rows * cols; i += kThreads) {
      S values[kChunk];
      load_channels(input, shape, c0, count, y0 + i / cols, x0 + i % cols, values);
      VSOD_UNROLL
      for (int c = 0; c < kChunk; ++c)
        if (c < count) tile[c * rows * cols + i] = values[c];
    }
  }

  template <class Weight>
  VSOD_BOTH static void fill_weights(int thread, int c0, int count, int tap0, int taps,
                                     const Weight& weight, S* weights) {
    for (int i = thread; i < count * taps * kOutputs; i += kThreads) {
      const int o = i % kOutputs, tap = i / kOutputs % taps, c = i / kOutputs / taps;
      weights[i] = weight(o, c0 + c, tap0 + tap);
    }
  }

  // Phase: adds the taps of `count` channels.
  VSOD_BOTH static void accumulate(int thread, const S* tile, const S* weights, int count,
                                   const Stages& stages, int run_kernel, int run_dilation,
                                   Registers& registers) {
    const int kernel = kFast ? 3 : run_kernel, dilation = kFast ? 1 : run_dilation;
    const int rows = kFast ? kWarps * kRows + 2 : stages.rows;
    const int cols = kFast ? kTileX + 2 : stages.cols;
    const S* column = tile + thread / kWarp * kRows * cols + thread % kWarp;
    for (int c = 0; c < count; ++c, column += rows * cols) {
      VSOD_UNROLL
      for (int ky = 0; ky < kernel; ++ky) {
        VSOD_UNROLL
        for (int kx = 0; kx < kernel; ++kx) {
          S w[kOutputs];
          VSOD_UNROLL
          for (int o = 0; o < kOutputs; o += 4) {
            const Four<S> four = *reinterpret_cast<const Four<S>*>(weights + o);
            VSOD_UNROLL
            for (int j = 0; j < 4; ++j) w[o + j] = four.v[j];
          }
          weights += kOutputs;
          VSOD_UNROLL
          for (int p = 0; p < kRows; ++p) {
            const S value = column[(p + ky * dilation) * cols + kx * dilation];
            VSOD_UNROLL
            for (int o = 0; o < kOutputs; ++o) registers.sum[p][o] += value * w[o];
          }
        }
      }
    }
  }

  // Phase: sums to shared memory, (kOutputs, plane) with a row of 32 pixels after the other.
  VSOD_BOTH static void store(int thread, const Registers& registers, int plane, S* sums) {
    VSOD_UNROLL
    for (int p = 0; p < kRows; ++p) {
      VSOD_UNROLL
      for (int o = 0; o < kOutputs; ++o)
        sums[o * plane + (thread / kWarp * kRows + p) * kTileX + thread % kWarp] =
            registers.sum[p][o];
    }
  }
};

// The same by tensor cores, for 16-bit N: products of 16 pixels x 16 channels and taps x 8 outputs.
template <class N, bool kFast, int kRows, int kOutputs>
struct TensorCoreTile {
  using S = float;
  static constexpr int kColumns = kOutputs / 8;  // of 8 outputs
  static_assert(kOutputs % 8 == 0 && kChunk == 8, "a step takes two taps of 8 channels");
  struct Registers {
    float sum[kRows][2][kColumns][4] = {};
  };

  // Numbers of float.  Tile (rows, cols, 8 channels) of N, then weights as the products take them,
  // (steps, kColumns, lane, 2 registers) of N pairs.
  VSOD_BOTH static int64_t tile_numbers(int64_t, int64_t rows, int64_t cols) {
    return rows * cols * kChunk / 2;
  }
  VSOD_BOTH static int64_t weight_numbers(int64_t, int64_t taps) {
    return (taps + 1) / 2 * kColumns * kWarp * 2;
  }

  VSOD_BOTH static void fill_tile(int thread, const Input<N>& input, const Shape& shape, int c0,
                                  int count, int rows, int cols, int64_t y0, int64_t x0,
                                  float* tile) {
    VSOD_ROLLED
    for (int i = thread; i < rows * cols; i += kThreads) {
      Eight<N> values;
      load_channels(input, shape, c0, count, y0 + i / cols, x0 + i % cols, values.v);
      reinterpret_cast<Eight<N>*>(tile)[i] = values;
    }
  }

  template <class Weight>
  VSOD_BOTH static void fill_weights(int thread, int c0, int count, int tap0, int taps,
                                     const Weight& weight, float* weights) {
    const int steps = (taps + 1) / 2;
    for (int i = thread; i < steps * kColumns * kWarp * 4; i += kThreads) {
      const int half = i % 2, part = i / 2 % 2, lane = i / 4 % kWarp, rest = i / (4 * kWarp);
      const int o = rest % kColumns * 8 + lane / 4, tap = rest / kColumns * 2 + part;
      const int c = lane % 4 * 2 + half;
      reinterpret_cast<N*>(weights)[i] =
          tap < taps && c < count ? N(weight(o, c0 + c, tap0 + tap)) : N(0.0f);
    }
  }

  VSOD_BOTH static void accumulate(int thread, const float* tile, const float* weights, int,
                                   const Stages& stages, int run_kernel, int run_dilation,
                                   Registers& registers) {
    const int kernel = kFast ? 3 : run_kernel, dilation = kFast ? 1 : run_dilation;
    const int cols = kFast ? kTileX + 2 : stages.cols, taps = kernel * kernel;
    const N* pixels = reinterpret_cast<const N*>(tile) + thread / kWarp * kRows * cols * kChunk;
    VSOD_ROLLED
    for (int step = 0; step < (taps + 1) / 2; ++step) {
      const int tap[2] = {2 * step, 2 * step + 1};
      int offset[2];
      VSOD_UNROLL
      for (int i = 0; i < 2; ++i)
        offset[i] = (tap[i] / kernel * cols + tap[i] % kernel) * dilation * kChunk;
      VSOD_UNROLL
      for (int row = 0; row < kRows; ++row) {
        VSOD_UNROLL
        for (int half = 0; half < 2; ++half) {
          const N* from = pixels + (row * cols + half * 16) * kChunk;
          // Zeros where there is no second tap: a weight of zero would make infinity NaN.
          const auto a = [&](int lane, int r) {
            const int x = lane / 4 + r % 2 * 8;
            return tap[r / 2] < taps ? read_pair(from + offset[r / 2] + x * kChunk + lane % 4 * 2)
                                     : 0u;
          };
          VSOD_UNROLL
          for (int column = 0; column < kColumns; ++column) {
            const auto b = [&](int lane, int r) {
              return read_pair(reinterpret_cast<const N*>(
                  weights + ((step * kColumns + column) * kWarp + lane) * 2 + r));
            };
            multiply_add_16x8x16<N>(thread % kWarp, a, b, registers.sum[row][half][column]);
          }
        }
      }
    }
  }

  VSOD_BOTH static void store(int thread, const Registers& registers, int plane, float* sums) {
    const int lane = thread % kWarp;
    VSOD_UNROLL
    for (int row = 0; row < kRows; ++row) {
      VSOD_UNROLL
      for (int half = 0; half < 2; ++half) {
        VSOD_UNROLL
        for (int column = 0; column < kColumns; ++column) {
          VSOD_UNROLL
          for (int i = 0; i < 4; ++i) {
            const int o = column * 8 + lane % 4 * 2 + i % 2;
            const int x = half * 16 + lane / 4 + i / 2 * 8;
            sums[o * plane + (thread / kWarp * kRows + row) * kTileX + x] =
                registers.sum[row][half][column][i];
          }
        }
      }
    }
  }
};

template <class N, bool kFast, int kRows, int kOutputs>
using ConvolutionTile =
    std::conditional_t<kTensorCores<N>, TensorCoreTile<N, kFast, kRows, kOutputs>,
                       FmaTile<N, kFast, kRows, kOutputs>>;

// A convolution of kOutputs outputs on tiles of 32 x kTileY pixels, with its sums in shared memory.
template <class N, bool kFast, int kRows, int kOutputs>
struct Convolution {
  using S = typename Wide<N>::type;
  using Tile = ConvolutionTile<N, kFast, kRows, kOutputs>;
  using Registers = typename Tile::Registers;
  static constexpr int kTileY = kWarps * kRows;
  // A plane is 4 banks after the one before: a warp that stores 8 pixels of 4 planes meets no bank
  // twice (its planes are 2 apart).
  static constexpr int kPlane = kTileY * kTileX + 4;

  Stages stages;

  VSOD_BOTH static int64_t stage_numbers(const Stages& s) {
    return Tile::tile_numbers(s.chunk, s.rows, s.cols) + Tile::weight_numbers(s.chunk, s.taps);
  }
  int64_t shared_numbers() const {
    const int64_t staged = stage_numbers(stages), sums = kOutputs * kPlane;
    return staged > sums ? staged : sums;
  }

  static Convolution plan(const Shape& shape, int64_t channels) {
    const int64_t reach = shape.reach();
    const int most = int(channels < kChunk && !kFast ? channels : kChunk);  // kFast: whole chunks
    if (reach < 4096)
      for (int chunk = most; chunk >= 1; --chunk) {
        const Stages all{chunk, shape.taps(), int(kTileY + 2 * reach), int(kTileX + 2 * reach)};
        if (stage_numbers(all) * 4 <= kSharedBytes) return {all};
      }
    return {{most, 1, kTileY, kTileX}};  // one tap a stage
  }

  // All stages.  weight(o, channel, tap) is the weight of output o of the block.
  template <class Block, class Weight>
  VSOD_BOTH void run(Block& block, const Shape& shape, const Input<N>& input, const Place& at,
                     const Weight& weight) const {
    const int rows = kFast ? kTileY + 2 : stages.rows, cols = kFast ? kTileX + 2 : stages.cols;
    const int chunk = kFast ? kChunk : stages.chunk, taps = kFast ? 9 : stages.taps;
    const bool all_taps = kFast || taps == shape.taps();
    S* tile = block.template shared<S>();
    S* weights = tile + Tile::tile_numbers(chunk, rows, cols);
    const int channels = input.channels();
    VSOD_ROLLED
    for (int c0 = 0; c0 < channels; c0 += chunk) {
      const int count = channels - c0 < chunk ? channels - c0 : chunk;
      VSOD_ROLLED
      for (int tap0 = 0; tap0 < (kFast ? 9 : shape.taps()); tap0 += taps) {
        int64_t y0 = at.y - (kFast ? 1 : shape.reach()), x0 = at.x - (kFast ? 1 : shape.reach());
        if (!all_taps) {
          y0 += int64_t(tap0 / shape.kernel) * shape.dilation;
          x0 += int64_t(tap0 % shape.kernel) * shape.dilation;
        }
        block.phase([&](int thread, Registers&) {
          Tile::fill_tile(thread, input, shape, c0, count, rows, cols, y0, x0, tile);
          Tile::fill_weights(thread, c0, count, tap0, taps, weight, weights);
        });
        block.phase([&](int thread, Registers& registers) {
          Tile::accumulate(thread, tile, weights, count, stages, all_taps ? shape.kernel : 1,
                           shape.dilation, registers);
        });
      }
    }
    block.phase([&](int thread, Registers& registers) {
      Tile::store(thread, registers, kPlane, block.template shared<S>());
    });
  }
};

// Peephole weights (3, M) or (3, M, H, W), rows i, f, o; null for none.
template <class N>
struct Peephole {
  const N* data;
  int64_t row, channel, pixel;  // strides

  template <class S>
  VSOD_BOTH void load(int64_t at_channel, int64_t at_pixel, S (&w)[3]) const {
    VSOD_UNROLL
    for (int r = 0; r < 3; ++r)
      w[r] = data ? S(data[r * row + at_channel * channel + at_pixel * pixel]) : S(0);
  }
};

// c_t of all steps: c_first before the first step (null: zeros), c_last after the last one, `cells`
// (strides b, t; 0 for t where only the newest is kept, in c_last itself) between.
template <class S>
struct Cells {
  const S* first;
  S* last;
  S* between;
  int64_t b, t;

  VSOD_BOTH const S* before(int64_t batch, int64_t step, int64_t numbers) const {
    if (step > 0) return between + batch * b + (step - 1) * t;
    return first ? first + batch * numbers : nullptr;
  }
  VSOD_BOTH S* after(int64_t batch, int64_t step, int64_t steps, int64_t numbers) const {
    return step == steps - 1 ? last + batch * numbers : between + batch * b + step * t;
  }
};

// x and the hidden state before each step.
template <class N>
struct Sequence {
  Frames<N> x;
  const N* h_first;  // (B, M, H, W), null for zeros
  const N* out;      // (B, T, M, H, W)

  VSOD_BOTH Input<N> at(const Shape& shape, int64_t batch, int64_t step) const {
    const int64_t numbers = shape.hidden * shape.pixels();
    const N* h = step > 0 ? out + (batch * shape.steps + step - 1) * numbers
                          : (h_first ? h_first + batch * numbers : nullptr);
    return {{x.data + batch * x.b + step * x.t, x.c, x.y, x.x, int(shape.channels)},
            {h, shape.pixels(), shape.width, 1, h ? int(shape.hidden) : 0}};
  }
};

// Gates or their gradients of several steps, (B, slots, 4M, H, W); step t lies in slot t % slots.
template <class N>
struct GateFrames {
  N* data;
  int64_t slots;

  VSOD_BOTH N* at(const Shape& shape, int64_t batch, int64_t step) const {
    return data + (batch * slots + step % slots) * 4 * shape.hidden * shape.pixels();
  }
};

}  // namespace conv_lstm_cuda
}  // namespace vsod
