// The CUDA kernels of conv_lstm for few channels, as phases: functions called once per thread, with
// barriers only between phases.  cuda.cu calls them with __syncthreads() between; cuda_on_host.cpp
// calls each for every thread of a block in a loop, so that indexing, halo, borders and reductions
// are tested on machines without a GPU.  One kernel is one struct here:
//
//   ForwardKernel       gates, c_t and h_t of one step, or the gates of several steps again
//   StepBackwardKernel  dh_t gathered from the gate gradients of step t+1, then those of step t
//   GatherKernel        dx of several steps, or dh_0
//   WeightKernel        dW_ih, dW_hh and db of several steps, as one partial sum a block
//   PeepholeKernel      dpeephole of several steps, the same way
//   ReduceKernel        the sum of the partial sums, in a fixed order: no atomics anywhere
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
// Weight gradient: a thread keeps 8 outputs x 9 taps of one input channel (72 sums), a block 16
// outputs x 8 channels x 8 rows of threads, and walks over its tiles of 32 x 8 pixels.  Four pixels
// cost 18 input loads and 8 loads of 16 bytes for 288 FMA; the pitches keep them free of bank
// conflicts.  The 8 rows of threads are summed once, at the end.
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

#if defined(__CUDACC__)
#define VSOD_BOTH __host__ __device__ __forceinline__
#define VSOD_UNROLL _Pragma("unroll")
#define VSOD_UNROLL8 _Pragma("unroll 8")
#define VSOD_ROLLED _Pragma("unroll 1")
#else
#define VSOD_BOTH inline
#define VSOD_UNROLL
#define VSOD_UNROLL8
#define VSOD_ROLLED
#endif

namespace vsod {
namespace conv_lstm_cuda {

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTileX = kWarp;       // pixels: one a lane
constexpr int kChunk = 8;           // input channels that are in shared memory at a time
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
VSOD_BOTH double hyperbolic_tangent(double x) { return tanh(x); }
VSOD_BOTH float hyperbolic_tangent(float x) { return tanhf(x); }

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
            return tap[r / 2] < taps
                       ? read_pair(from + offset[r / 2] + x * kChunk + lane % 4 * 2)
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

// ---- forward ------------------------------------------------------------------------------------

template <class N, bool kFast>
struct ForwardKernel {
  using S = typename Wide<N>::type;
  static constexpr int kRows = 4, kHidden = 4, kOutputs = 4 * kHidden;  // gate by gate
  using Conv = Convolution<N, kFast, kRows, kOutputs>;
  using Registers = typename Conv::Registers;
  static constexpr int kTileY = Conv::kTileY;
  static constexpr int kBlocksPerMultiprocessor = kTensorCores<N> ? 3 : 4;
  static constexpr const char* kName = "conv_lstm_fwd_kernel";

  Shape shape;
  Conv convolution;
  Grid grid;
  int64_t first_step, step_count;  // frames of the grid: step_count steps of each sample
  Sequence<N> sequence;
  const N *weight_ih, *weight_hh, *bias;
  Peephole<N> peephole;
  Cells<S> cells;
  bool write_state;     // false where the gates are computed again
  N* out;               // (B, T, M, H, W)
  GateFrames<N> gates;  // data null: not written

  int64_t blocks() const { return grid.blocks(); }
  int64_t shared_numbers() const { return convolution.shared_numbers(); }

  template <class Block>
  VSOD_BOTH void run(Block& block, uint32_t index) const {
    const Place at = place(grid, index, kTileY);
    const int64_t batch = at.frame / step_count, step = first_step + at.frame % step_count;
    const int m0 = at.group * kHidden, hidden = int(shape.hidden), channels = int(shape.channels);
    const int taps = kFast ? 9 : shape.taps();
    const auto weight = [&](int o, int channel, int tap) -> S {
      const int m = m0 + o % kHidden;
      if (m >= hidden) return 0;
      const int64_t row = int64_t(o / kHidden) * hidden + m;
      return channel < channels
                 ? S(weight_ih[(row * channels + channel) * taps + tap])
                 : S(weight_hh[(row * hidden + channel - channels) * taps + tap]);
    };
    convolution.run(block, shape, sequence.at(shape, batch, step), at, weight);
    const S* sums = block.template shared<S>();
    block.phase([&](int thread, Registers&) {
      VSOD_ROLLED
      for (int m = 0; m < kHidden && m0 + m < hidden; ++m)
        cell(thread, m0 + m, batch, step, at, sums + m * Conv::kPlane);
    });
  }

  // The gate arithmetic of one hidden channel and the pixels of one thread.
  VSOD_BOTH void cell(int thread, int64_t channel, int64_t batch, int64_t step, const Place& at,
                      const S* sums) const {
    const int64_t x = at.x + thread % kWarp, y0 = at.y + thread / kWarp * kRows;
    if (x >= shape.width) return;
    sums += thread / kWarp * kRows * kTileX + thread % kWarp;
    const int64_t pixels = shape.pixels(), numbers = shape.hidden * pixels;
    const S* before = cells.before(batch, step, numbers);
    S* after = cells.after(batch, step, shape.steps, numbers) + channel * pixels;
    N* h = out + (batch * shape.steps + step) * numbers + channel * pixels;
    N* kept = gates.data ? gates.at(shape, batch, step) + channel * pixels : nullptr;
    S b[4], c[kRows];
    VSOD_UNROLL
    for (int g = 0; g < 4; ++g) b[g] = bias ? S(bias[g * shape.hidden + channel]) : S(0);
    VSOD_UNROLL
    for (int p = 0; p < kRows; ++p)
      c[p] = before && y0 + p < shape.height
                 ? before[channel * pixels + (y0 + p) * shape.width + x]
                 : S(0);
    VSOD_UNROLL
    for (int p = 0; p < kRows; ++p) {
      if (y0 + p >= shape.height) break;
      const int64_t pixel = (y0 + p) * shape.width + x;
      S sum[4], w[3];
      VSOD_UNROLL
      for (int g = 0; g < 4; ++g) sum[g] = sums[g * kHidden * Conv::kPlane + p * kTileX] + b[g];
      peephole.load(channel, pixel, w);
      const S i = sigmoid(sum[0] + w[0] * c[p]);
      const S f = sigmoid(sum[1] + w[1] * c[p]);
      const S g = hyperbolic_tangent(sum[2]);
      const S new_c = f * c[p] + i * g;
      const S o = sigmoid(sum[3] + w[2] * new_c);
      if (write_state) {
        after[pixel] = new_c;
        h[pixel] = N(o * hyperbolic_tangent(new_c));
      }
      if (kept) {
        kept[pixel] = N(i);
        kept[pixel + numbers] = N(f);
        kept[pixel + 2 * numbers] = N(g);
        kept[pixel + 3 * numbers] = N(o);
      }
    }
  }
};

// ---- backward: gate gradients and what flows through the convolutions ---------------------------

// What gathers from gate gradients: sums for outputs of weight (4M, outputs, k, k), turned by 180
// degrees.
template <class N, bool kFast, int kOutputs>
struct Gather {
  using S = typename Wide<N>::type;
  static constexpr int kRows = 8;
  using Conv = Convolution<N, kFast, kRows, kOutputs>;

  Conv convolution;
  const N* weight;
  int outputs;

  template <class Block>
  VSOD_BOTH void run(Block& block, const Shape& shape, const N* gate_frame, const Place& at) const {
    const Input<N> input{{gate_frame, shape.pixels(), shape.width, 1, int(4 * shape.hidden)},
                         {nullptr, 0, 0, 0, 0}};
    const int j0 = at.group * kOutputs, taps = kFast ? 9 : shape.taps();
    convolution.run(block, shape, input, at, [&](int j, int channel, int tap) -> S {
      if (j0 + j >= outputs) return 0;
      return S(weight[(int64_t(channel) * outputs + j0 + j) * taps + taps - 1 - tap]);
    });
  }
};

template <class N, bool kFast, int kOutputs>
struct GatherKernel {
  using S = typename Wide<N>::type;
  using Conv = typename Gather<N, kFast, kOutputs>::Conv;
  using Registers = typename Conv::Registers;
  static constexpr int kRows = 8, kTileY = Conv::kTileY;
  static constexpr int kBlocksPerMultiprocessor = kTensorCores<N> ? 3 : 4;
  static constexpr const char* kName = "conv_lstm_bwd_gather_kernel";

  Shape shape;
  Gather<N, kFast, kOutputs> gather;
  Grid grid;
  int64_t first_step, step_count;
  GateFrames<const N> gate_gradients;
  N* result;  // (B, result_steps, outputs, H, W), written from step first_step on
  int64_t result_steps;

  int64_t blocks() const { return grid.blocks(); }
  int64_t shared_numbers() const { return gather.convolution.shared_numbers(); }

  template <class Block>
  VSOD_BOTH void run(Block& block, uint32_t index) const {
    const Place at = place(grid, index, kTileY);
    const int64_t batch = at.frame / step_count, step = first_step + at.frame % step_count;
    gather.run(block, shape, gate_gradients.at(shape, batch, step), at);
    const S* sums = block.template shared<S>();
    block.phase([&](int thread, Registers&) {
      const int64_t x = at.x + thread % kWarp, y0 = at.y + thread / kWarp * kRows;
      if (x >= shape.width) return;
      const int outputs = gather.outputs;
      N* frame = result + (batch * result_steps + step) * outputs * shape.pixels();
      VSOD_ROLLED
      for (int j = 0; j < kOutputs && at.group * kOutputs + j < outputs; ++j) {
        const S* from = sums + j * Conv::kPlane + thread / kWarp * kRows * kTileX + thread % kWarp;
        N* plane = frame + (at.group * kOutputs + j) * shape.pixels() + x;
        VSOD_UNROLL
        for (int p = 0; p < kRows; ++p)
          if (y0 + p < shape.height) plane[(y0 + p) * shape.width] = N(from[p * kTileX]);
      }
    });
  }
};

template <class N, bool kFast, int kOutputs>
struct StepBackwardKernel {
  using S = typename Wide<N>::type;
  using Conv = typename Gather<N, kFast, kOutputs>::Conv;
  using Registers = typename Conv::Registers;
  static constexpr int kRows = 8, kTileY = Conv::kTileY;
  static constexpr int kBlocksPerMultiprocessor = kTensorCores<N> ? 3 : 4;
  static constexpr int kTogether = 4;  // pixels whose loads are in flight together
  static constexpr const char* kName = "conv_lstm_bwd_step_kernel";

  Shape shape;
  Gather<N, kFast, kOutputs> gather;
  Grid grid;
  int64_t step;
  Frames<N> grad_out;         // data null: zeros
  const S* grad_c;            // (B, M, H, W) at the last step, null: zeros
  S* dc;                      // (B, M, H, W), from step to step
  GateFrames<const N> gates;  // may be the memory of gate_gradients
  GateFrames<N> gate_gradients;
  Cells<S> cells;
  Peephole<N> peephole;

  int64_t blocks() const { return grid.blocks(); }
  int64_t shared_numbers() const { return gather.convolution.shared_numbers(); }

  template <class Block>
  VSOD_BOTH void run(Block& block, uint32_t index) const {
    const Place at = place(grid, index, kTileY);
    const bool last = step + 1 == shape.steps;  // nothing comes from a step after it
    if (!last) gather.run(block, shape, gate_gradients.at(shape, at.frame, step + 1), at);
    const S* sums = last ? nullptr : block.template shared<S>();
    block.phase([&](int thread, Registers&) {
      VSOD_ROLLED
      for (int j = 0; j < kOutputs; ++j) {
        const int64_t channel = at.group * kOutputs + j;
        if (channel >= shape.hidden) break;
        VSOD_ROLLED
        for (int p = 0; p < kRows; p += kTogether)
          cell(thread, p, channel, at, sums ? sums + j * Conv::kPlane : nullptr);
      }
    });
  }

  // Gate gradients of one hidden channel and kTogether pixels, rows p0 .. of the thread's.
  VSOD_BOTH void cell(int thread, int p0, int64_t channel, const Place& at, const S* sums) const {
    const int row0 = thread / kWarp * kRows + p0;
    const int64_t x = at.x + thread % kWarp, y0 = at.y + row0, batch = at.frame;
    if (x >= shape.width || y0 >= shape.height) return;
    const int64_t pixels = shape.pixels(), numbers = shape.hidden * pixels;
    const int64_t first = channel * pixels + y0 * shape.width + x;
    const N* kept = gates.at(shape, batch, step) + first;
    const S* before = cells.before(batch, step, numbers);
    const S* after = cells.after(batch, step, shape.steps, numbers) + first;
    const S* dc_in = step + 1 < shape.steps ? dc : grad_c;
    N* result = gate_gradients.at(shape, batch, step) + first;
    const N* grad = grad_out.data + batch * grad_out.b + step * grad_out.t + channel * grad_out.c +
                    y0 * grad_out.y + x * grad_out.x;
    S i[kTogether], f[kTogether], g[kTogether], o[kTogether];
    S c_before[kTogether], c_after[kTogether], dcell[kTogether], dh[kTogether];
    VSOD_UNROLL
    for (int p = 0; p < kTogether; ++p) {
      if (y0 + p >= shape.height) break;
      const int64_t row = p * shape.width;
      i[p] = S(kept[row]);
      f[p] = S(kept[row + numbers]);
      g[p] = S(kept[row + 2 * numbers]);
      o[p] = S(kept[row + 3 * numbers]);
      c_before[p] = before ? before[first + row] : S(0);
      c_after[p] = after[row];
      dcell[p] = dc_in ? dc_in[batch * numbers + first + row] : S(0);
      dh[p] = (sums ? sums[(row0 + p) * kTileX + thread % kWarp] : S(0)) +
              (grad_out.data ? S(grad[p * grad_out.y]) : S(0));
    }
    VSOD_UNROLL
    for (int p = 0; p < kTogether; ++p) {
      if (y0 + p >= shape.height) break;
      const int64_t row = p * shape.width;
      S w[3];
      peephole.load(channel, (y0 + p) * shape.width + x, w);
      const S tanh_c = hyperbolic_tangent(c_after[p]);
      const S d_o = dh[p] * tanh_c * o[p] * (1 - o[p]);
      const S d_c = dcell[p] + dh[p] * o[p] * (1 - tanh_c * tanh_c) + w[2] * d_o;
      const S d_i = d_c * g[p] * i[p] * (1 - i[p]);
      const S d_f = d_c * c_before[p] * f[p] * (1 - f[p]);
      const S d_g = d_c * i[p] * (1 - g[p] * g[p]);
      dc[batch * numbers + first + row] = d_c * f[p] + w[0] * d_i + w[1] * d_f;
      result[row] = N(d_i);
      result[row + numbers] = N(d_f);
      result[row + 2 * numbers] = N(d_g);
      result[row + 3 * numbers] = N(d_o);
    }
  }
};

// ---- weight gradient ----------------------------------------------------------------------------

// What one block of a weight gradient owns: kOutputs gate channels from o0 on, 8 input channels
// from c0 on, the taps from (ky, kx) on, and every `walks`-th tile of 32 x 8 pixels.  Undilated
// 3 x 3 kernels (kFast) have all nine taps in a block, others up to three of one row.
template <class N, bool kFast>
struct WeightTask {
  using S = typename Wide<N>::type;
  static constexpr int kTileY = 8;

  Shape shape;
  int64_t first_step, step_count;
  Sequence<N> sequence;
  GateFrames<const N> gate_gradients;
  S* partial;      // (walks, row_numbers(shape)): dW_ih, dW_hh, db, one after the other
  bool add;        // to what is there, or overwrite it
  uint32_t walks;  // blocks that share the tiles
  uint32_t output_blocks, channel_blocks, tap_blocks;

  static int64_t row_numbers(const Shape& s) {
    return 4 * s.hidden * ((s.channels + s.hidden) * s.taps() + 1);
  }
  static int64_t tap_block_count(const Shape& s) {
    return kFast ? 1 : s.kernel * ceil_div(s.kernel, 3);
  }
  int64_t blocks() const {
    return int64_t(walks) * output_blocks * channel_blocks * tap_blocks;
  }

  struct Part {
    int o0, c0, ky, kx;
    uint32_t walk;
    bool with_bias;
  };

  VSOD_BOTH Part part(uint32_t index, int outputs) const {
    Part p;
    p.o0 = int(index % output_blocks) * outputs;
    index /= output_blocks;
    p.c0 = int(index % channel_blocks) * kChunk;
    index /= channel_blocks;
    const int tap_block = int(index % tap_blocks), tap_columns = (shape.kernel + 2) / 3;
    p.ky = kFast ? 0 : tap_block / tap_columns;
    p.kx = kFast ? 0 : tap_block % tap_columns * 3;
    p.walk = index / tap_blocks;
    p.with_bias = p.c0 == 0 && tap_block == 0;
    return p;
  }

  // Calls f(input, gate gradients, place) for each tile of the block.
  template <class F>
  VSOD_BOTH void each_tile(const Part& part, const F& f) const {
    const uint32_t tiles_x = uint32_t((shape.width + kTileX - 1) / kTileX);
    const uint32_t tiles_y = uint32_t((shape.height + kTileY - 1) / kTileY);
    const uint32_t tiles = uint32_t(shape.batch * step_count) * tiles_y * tiles_x;
    VSOD_ROLLED
    for (uint32_t tile = part.walk; tile < tiles; tile += walks) {
      const Place at = place(Grid{0, tiles_y, tiles_x, 1}, tile, kTileY);
      const int64_t batch = at.frame / step_count, step = first_step + at.frame % step_count;
      f(sequence.at(shape, batch, step), gate_gradients.at(shape, batch, step), at);
    }
  }

  // The place of a weight in a row of `partial`; -1 for one that is none.
  VSOD_BOTH int64_t weight_place(int64_t o, int channel, int ky, int kx) const {
    const int channels = int(shape.channels), hidden = int(shape.hidden);
    const int kernel = kFast ? 3 : shape.kernel, taps = kernel * kernel;
    const int64_t outputs = 4 * shape.hidden;
    if (o >= outputs || channel >= channels + hidden || kx >= kernel) return -1;
    const int tap = ky * kernel + kx;
    if (channel < channels) return (o * channels + channel) * taps + tap;
    return (outputs * channels + o * hidden + channel - channels) * taps + tap;
  }
  VSOD_BOTH int64_t bias_place(int64_t o) const {
    const int kernel = kFast ? 3 : shape.kernel;
    const int64_t outputs = 4 * shape.hidden;
    return o < outputs ? outputs * (shape.channels + shape.hidden) * kernel * kernel + o : -1;
  }

  VSOD_BOTH void write(const Part& part, int64_t place_in_row, S sum) const {
    const int64_t outputs = 4 * shape.hidden;
    const int kernel = kFast ? 3 : shape.kernel;
    const int64_t numbers = outputs * ((shape.channels + shape.hidden) * kernel * kernel + 1);
    S* to = partial + part.walk * numbers + place_in_row;
    *to = add ? *to + sum : sum;
  }
};

// By float32 multiply-adds: a thread keeps 8 gate channels x all taps of one input channel and adds
// one row of 32 pixels of each tile.
template <class N, bool kFast, int>
struct FmaWeightKernel : WeightTask<N, kFast> {
  using Task = WeightTask<N, kFast>;
  using S = typename Task::S;
  using Task::kTileY;
  using typename Task::Part;
  static constexpr int kGroups = 2, kPerThread = 8, kOutputs = kGroups * kPerThread;
  static constexpr int kTapRows = kFast ? 3 : 1, kTaps = 3 * kTapRows;
  static constexpr int kSums = kPerThread * kTaps;
  static constexpr int kPairs = kGroups * kChunk;  // threads of one row of pixels
  // Pitches in numbers.  Gate gradients: a row is 8 banks after the one before, a channel 4; a
  // warp reads 2 rows of 2 channels, 16 bytes each.  Inputs: a row is 2 banks further, a channel
  // 20; a warp reads 2 rows of 8 channels.
  static constexpr int kGatePitch = kTileX + 8, kGatePlane = kTileY * kGatePitch + 4;
  static constexpr int kInputPitch = kTileX + 2;
  static constexpr int kInputPlane = kFast ? (kTileY + 2) * kInputPitch : kTileY * kInputPitch + 4;
  static constexpr int kGateNumbers = kOutputs * kGatePlane;
  static constexpr int kInputNumbers = (kFast ? 1 : 3) * kChunk * kInputPlane;
  static constexpr int kTileNumbers = kGateNumbers + kInputNumbers;
  static constexpr int kReduceNumbers = kThreads * (kSums + 1);
  static constexpr int kBlocksPerMultiprocessor = 3;
  static constexpr const char* kName = "conv_lstm_bwd_weight_kernel";
  static_assert(kPairs * kTileY == kThreads && kGatePitch % 4 == 0, "a thread an output group");
  struct Registers {
    S sum[kPerThread][kTaps] = {};
    S bias_sum = 0;
  };

  int64_t shared_numbers() const {
    return kTileNumbers > kReduceNumbers ? kTileNumbers : kReduceNumbers;
  }

  template <class Block>
  VSOD_BOTH void run(Block& block, uint32_t index) const {
    const Part part = this->part(index, kOutputs);
    S* gate_tile = block.template shared<S>();
    S* input_tile = gate_tile + kGateNumbers;
    this->each_tile(part, [&](const Input<N>& input, const N* gates, const Place& at) {
      block.phase([&](int thread, Registers&) {
        fill_gates(thread, gates, part, at, gate_tile);
        fill_input(thread, input, part, at, input_tile);
      });
      block.phase([&](int thread, Registers& registers) {
        add_tile(thread, gate_tile, input_tile, part.with_bias, registers);
      });
    });

    // The rows of threads are summed in shared memory, in their order.
    S* all = block.template shared<S>();
    block.phase([&](int thread, Registers& registers) {
      VSOD_UNROLL
      for (int j = 0; j < kPerThread; ++j) {
        VSOD_UNROLL
        for (int k = 0; k < kTaps; ++k)
          all[(j * kTaps + k) * kThreads + thread] = registers.sum[j][k];
      }
      all[kSums * kThreads + thread] = registers.bias_sum;
    });
    block.phase([&](int thread, Registers&) {
      VSOD_ROLLED
      for (int i = thread; i < kPairs * (kSums + 1); i += kThreads) {
        const int pair = i % kPairs, slot = i / kPairs, group = pair / kChunk, c = pair % kChunk;
        int64_t to = -1;
        if (slot < kSums) {
          const int tap = slot % kTaps;
          to = this->weight_place(part.o0 + group + kGroups * (slot / kTaps), part.c0 + c,
                                  part.ky + tap / 3, part.kx + tap % 3);
        } else if (part.with_bias) {  // each thread has summed one gate channel for the bias
          to = this->bias_place(part.o0 + group + kGroups * c);
        }
        if (to < 0) continue;
        S sum = 0;
        for (int row = 0; row < kTileY; ++row) sum += all[slot * kThreads + row * kPairs + pair];
        this->write(part, to, sum);
      }
    });
  }

  VSOD_BOTH static int row_of(int thread) { return thread / kPairs; }
  VSOD_BOTH static int group_of(int thread) { return thread % kPairs / kChunk; }
  VSOD_BOTH static int channel_of(int thread) { return thread % kChunk; }

  VSOD_BOTH void fill_gates(int thread, const N* gates, const Part& part, const Place& at,
                            S* tile) const {
    const Shape& shape = this->shape;
    const int x = thread % kWarp;
    VSOD_ROLLED
    for (int y = thread / kWarp; y < kTileY; y += kWarps) {
      const bool inside = at.y + y < shape.height && at.x + x < shape.width;
      const N* source = gates + part.o0 * shape.pixels() + (at.y + y) * shape.width + at.x + x;
      VSOD_UNROLL
      for (int o = 0; o < kOutputs; ++o, source += shape.pixels())
        tile[o * kGatePlane + y * kGatePitch + x] =
            inside && part.o0 + o < 4 * shape.hidden ? S(*source) : S(0);
    }
  }

  VSOD_BOTH void fill_input(int thread, const Input<N>& input, const Part& part, const Place& at,
                            S* tile) const {
    constexpr int kCols = kFast ? kTileX + 2 : kTileX, kRows = kFast ? kTileY + 2 : kTileY;
    const Shape& shape = this->shape;
    const int reach = kFast ? 1 : shape.reach(), copies = kFast ? 1 : 3;
    const int count = input.channels() - part.c0;
    VSOD_ROLLED
    for (int copy = 0; copy < copies; ++copy, tile += kChunk * kInputPlane) {
      const int real = kFast || part.kx + copy < shape.kernel ? count : 0;
      const int64_t y0 = at.y - reach + (kFast ? 0 : int64_t(part.ky) * shape.dilation);
      const int64_t x0 = at.x - reach + (kFast ? 0 : int64_t(part.kx + copy) * shape.dilation);
      VSOD_ROLLED
      for (int i = thread; i < kRows * kCols; i += kThreads) {
        S values[kChunk];
        load_channels(input, shape, part.c0, real, y0 + i / kCols, x0 + i % kCols, values);
        VSOD_UNROLL
        for (int c = 0; c < kChunk; ++c)
          tile[c * kInputPlane + i / kCols * kInputPitch + i % kCols] = values[c];
      }
    }
  }

  // Adds one row of 32 pixels to the sums of a thread, four pixels at a time.
  VSOD_BOTH void add_tile(int thread, const S* gate_tile, const S* input_tile, bool with_bias,
                          Registers& registers) const {
    const int row = row_of(thread), channel = channel_of(thread);
    const S* gates = gate_tile + group_of(thread) * kGatePlane + row * kGatePitch;
    const S* input = input_tile + channel * kInputPlane + row * kInputPitch;
    const S* bias_gates = gates + kGroups * channel * kGatePlane;
    VSOD_ROLLED
    for (int x = 0; x < kTileX; x += 4) {
      S near[kFast ? 3 : 1][kFast ? 6 : 12];
      VSOD_UNROLL
      for (int r = 0; r < kTapRows; ++r) {
        VSOD_UNROLL
        for (int q = 0; q < (kFast ? 6 : 12); ++q)
          near[r][q] = kFast ? input[r * kInputPitch + x + q]
                             : input[q / 4 * kChunk * kInputPlane + x + q % 4];
      }
      VSOD_UNROLL
      for (int j = 0; j < kPerThread; ++j) {
        const Four<S> d =
            *reinterpret_cast<const Four<S>*>(gates + kGroups * j * kGatePlane + x);
        VSOD_UNROLL
        for (int k = 0; k < kTaps; ++k) {
          VSOD_UNROLL
          for (int q = 0; q < 4; ++q)
            registers.sum[j][k] += d.v[q] * near[k / 3][kFast ? q + k % 3 : 4 * k + q];
        }
      }
      if (with_bias) {
        const Four<S> d = *reinterpret_cast<const Four<S>*>(bias_gates + x);
        registers.bias_sum += (d.v[0] + d.v[1]) + (d.v[2] + d.v[3]);
      }
    }
  }
};

// By tensor cores, for 16-bit N: 16 gate channels x 8 input channels a product and tap, with 16
// pixels of a row as the inner dimension.  Each warp adds two rows of a tile.  A gate gradient is
// needed by one warp alone, so it goes from global memory to registers; inputs, which nine taps
// share, lie in shared memory, once as they are and once shifted by a pixel, so that each tap finds
// its pairs of pixels aligned.
template <class N, bool kFast, int kGateTiles>
struct TensorCoreWeightKernel : WeightTask<N, kFast> {
  using Task = WeightTask<N, kFast>;
  using S = float;
  using Task::kTileY;
  using typename Task::Part;
  static constexpr int kOutputs = 16 * kGateTiles;
  static constexpr int kTaps = kFast ? 9 : 3, kProducts = kTaps + 1;  // the last one for the bias
  // In N; a channel is 20 (or 4) banks after the one before.
  static constexpr int kCols = kFast ? kTileX + 2 : kTileX, kRows = kFast ? kTileY + 2 : kTileY;
  static constexpr int kPitch = kFast ? kTileX + 4 : kTileX;
  static constexpr int kPlane = kFast ? kRows * kPitch : kRows * kPitch + 8;
  static constexpr int kCopies = kFast ? 2 : 3;
  static constexpr int kTileNumbers = kCopies * kChunk * kPlane / 2;
  static constexpr int kSlots = kGateTiles * kProducts * 4;
  static constexpr int kReduceNumbers = kSlots * kThreads;
  static constexpr int kBlocksPerMultiprocessor = kGateTiles == 1 ? 4 : 3;
  static constexpr const char* kName = "conv_lstm_bwd_weight_kernel";
  struct Registers {
    float sum[kGateTiles][kProducts][4] = {};
  };

  int64_t shared_numbers() const {
    return kTileNumbers > kReduceNumbers ? kTileNumbers : kReduceNumbers;
  }

  template <class Block>
  VSOD_BOTH void run(Block& block, uint32_t index) const {
    const Part part = this->part(index, kOutputs);
    N* tile = reinterpret_cast<N*>(block.template shared<float>());
    this->each_tile(part, [&](const Input<N>& input, const N* gates, const Place& at) {
      block.phase([&](int thread, Registers&) { fill_input(thread, input, part, at, tile); });
      block.phase([&](int thread, Registers& registers) {
        add_tile(thread, gates, part, at, tile, registers);
      });
    });

    // The warps are summed in shared memory, in their order.
    float* all = block.template shared<float>();
    block.phase([&](int thread, Registers& registers) {
      VSOD_UNROLL
      for (int j = 0; j < kGateTiles; ++j) {
        VSOD_UNROLL
        for (int k = 0; k < kProducts; ++k) {
          VSOD_UNROLL
          for (int i = 0; i < 4; ++i)
            all[((j * kProducts + k) * 4 + i) * kThreads + thread] = registers.sum[j][k][i];
        }
      }
    });
    block.phase([&](int thread, Registers&) {
      VSOD_ROLLED
      for (int n = thread; n < kSlots * kWarp; n += kThreads) {
        const int lane = n % kWarp, slot = n / kWarp, i = slot % 4;
        const int tap = slot / 4 % kProducts, j = slot / 4 / kProducts;
        const int64_t o = part.o0 + 16 * j + lane / 4 + i / 2 * 8;
        const int c = lane % 4 * 2 + i % 2;
        int64_t to = -1;
        if (tap < kTaps)
          to = this->weight_place(o, part.c0 + c, part.ky + tap / 3, part.kx + tap % 3);
        else if (part.with_bias && c == 0)  // its columns are all the same
          to = this->bias_place(o);
        if (to < 0) continue;
        float sum = 0;
        for (int warp = 0; warp < kWarps; ++warp)
          sum += all[slot * kThreads + warp * kWarp + lane];
        this->write(part, to, sum);
      }
    });
  }

  VSOD_BOTH void fill_input(int thread, const Input<N>& input, const Part& part, const Place& at,
                            N* tile) const {
    const Shape& shape = this->shape;
    const int reach = kFast ? 1 : shape.reach(), loads = kFast ? 1 : 3;
    const int count = input.channels() - part.c0;
    VSOD_ROLLED
    for (int copy = 0; copy < loads; ++copy, tile += kChunk * kPlane) {
      const int real = kFast || part.kx + copy < shape.kernel ? count : 0;
      const int64_t y0 = at.y - reach + (kFast ? 0 : int64_t(part.ky) * shape.dilation);
      const int64_t x0 = at.x - reach + (kFast ? 0 : int64_t(part.kx + copy) * shape.dilation);
      VSOD_ROLLED
      for (int i = thread; i < kRows * kCols; i += kThreads) {
        const int y = i / kCols, x = i % kCols;
        N values[kChunk];
        load_channels(input, shape, part.c0, real, y0 + y, x0 + x, values);
        VSOD_UNROLL
        for (int c = 0; c < kChunk; ++c) {
          N* to = tile + c * kPlane + y * kPitch + x;
          *to = values[c];
          if (kFast && x > 0) to[kChunk * kPlane - 1] = values[c];
        }
      }
    }
  }

  VSOD_BOTH void add_tile(int thread, const N* gates, const Part& part, const Place& at,
                          const N* tile, Registers& registers) const {
    const Shape& shape = this->shape;
    const int64_t pixels = shape.pixels(), outputs = 4 * shape.hidden;
    // An odd width or an odd start makes pairs that no 32-bit load may read.
    const bool aligned = shape.width % 2 == 0 && reinterpret_cast<uintptr_t>(gates) % 4 == 0;
    const N one(1.0f);
    uint16_t one_bits;
    memcpy(&one_bits, &one, sizeof(one_bits));
    VSOD_ROLLED
    for (int y = thread / kWarp; y < kTileY; y += kWarps) {
      if (at.y + y >= shape.height) break;  // the same for all lanes of a warp
      const N* row = gates + (at.y + y) * shape.width + at.x;
      VSOD_ROLLED
      for (int x0 = 0; x0 < kTileX; x0 += 16) {
        VSOD_UNROLL
        for (int j = 0; j < kGateTiles; ++j) {
          // j itself is not captured: a loop variable with an address is not unrolled.
          const int first = part.o0 + 16 * j;
          const auto read = [&, first](int lane, int r) -> uint32_t {
            const int64_t o = first + lane / 4 + r % 2 * 8;
            const int x = x0 + lane % 4 * 2 + r / 2 * 8;
            if (o >= outputs || at.x + x >= shape.width) return 0;
            const N* from = row + o * pixels + x;
            if (aligned) return read_pair(from);
            uint16_t pair[2] = {0, 0};
            memcpy(&pair[0], from, 2);
            if (at.x + x + 1 < shape.width) memcpy(&pair[1], from + 1, 2);
            return pair[0] | uint32_t(pair[1]) << 16;
          };
          const Held<4, decltype(read)> a(thread % kWarp, read);
          VSOD_UNROLL
          for (int tap = 0; tap < kTaps; ++tap) {
            const int shift = tap % 3, copy = kFast ? shift % 2 : shift;
            const N* from = tile + copy * kChunk * kPlane + (y + (kFast ? tap / 3 : 0)) * kPitch +
                            x0 + (kFast ? shift / 2 * 2 : 0);
            const auto b = [&](int lane, int r) {
              return read_pair(from + lane / 4 * kPlane + lane % 4 * 2 + r * 8);
            };
            multiply_add_16x8x16<N>(thread % kWarp, a, b, registers.sum[j][tap]);
          }
          const auto ones = [&](int, int) { return one_bits | uint32_t(one_bits) << 16; };
          if (part.with_bias)
            multiply_add_16x8x16<N>(thread % kWarp, a, ones, registers.sum[j][kTaps]);
        }
      }
    }
  }
};

template <class N, bool kFast, int kGateTiles>
using WeightKernel =
    std::conditional_t<kTensorCores<N>, TensorCoreWeightKernel<N, kFast, kGateTiles>,
                       FmaWeightKernel<N, kFast, kGateTiles>>;

// ---- peephole gradient and the sum of partial sums ----------------------------------------------

// Sums di c_{t-1}, df c_{t-1}, do c_t over samples and steps.  (3, M, H, W): a thread a pixel,
// partial (1, 3 M H W).  (3, M): a block sums `per_block` pixels, partial (chunks, 3 M).
template <class N>
struct PeepholeKernel {
  using S = typename Wide<N>::type;
  static constexpr int kBlocksPerMultiprocessor = 4;
  static constexpr const char* kName = "conv_lstm_bwd_peephole_kernel";
  struct Registers {};

  Shape shape;
  int64_t first_step, step_count;
  GateFrames<const N> gate_gradients;
  Cells<S> cells;
  bool full, add;
  int64_t per_block;
  uint32_t chunks;
  S* partial;

  int64_t blocks() const { return chunks * shape.hidden; }
  int64_t shared_numbers() const { return 3 * kThreads; }

  template <class Block>
  VSOD_BOTH void run(Block& block, uint32_t index) const {
    const int64_t chunk = index % chunks, channel = index / chunks;
    S* all = block.template shared<S>();
    block.phase([&](int thread, Registers&) {
      const int64_t stop = (chunk + 1) * per_block, pixels = shape.pixels();
      S sum[3] = {0, 0, 0};
      for (int64_t p = chunk * per_block + thread; p < stop && p < pixels; p += kThreads) {
        add_pixel(channel, p, sum);
        if (!full) continue;
        for (int r = 0; r < 3; ++r) {
          S* to = partial + (r * shape.hidden + channel) * pixels + p;
          *to = add ? *to + sum[r] : sum[r];
          sum[r] = 0;
        }
      }
      for (int r = 0; r < 3; ++r) all[r * kThreads + thread] = sum[r];
    });
    block.phase([&](int thread, Registers&) {
      if (full || thread >= 3) return;
      S sum = 0;
      for (int i = 0; i < kThreads; ++i) sum += all[thread * kThreads + i];
      S* to = partial + chunk * 3 * shape.hidden + thread * shape.hidden + channel;
      *to = add ? *to + sum : sum;
    });
  }

  VSOD_BOTH void add_pixel(int64_t channel, int64_t p, S (&sum)[3]) const {
    const int64_t pixels = shape.pixels(), numbers = shape.hidden * pixels;
    for (int64_t batch = 0; batch < shape.batch; ++batch)
      for (int64_t step = first_step; step < first_step + step_count; ++step) {
        const int64_t at = channel * pixels + p;
        const N* gates = gate_gradients.at(shape, batch, step) + at;
        const S* before = cells.before(batch, step, numbers);
        const S c = before ? before[at] : S(0);
        sum[0] += S(gates[0]) * c;
        sum[1] += S(gates[numbers]) * c;
        sum[2] += S(gates[3 * numbers]) * cells.after(batch, step, shape.steps, numbers)[at];
      }
  }
};

// result[i] = the sum over r of partial[r][offset + i], rounded once: 32 numbers a block, 4 threads
// a number, each over a quarter of the rows.
template <class N>
struct ReduceKernel {
  using S = typename Wide<N>::type;
  static constexpr int kBlocksPerMultiprocessor = 4;
  static constexpr const char* kName = "conv_lstm_bwd_reduce_kernel";
  struct Registers {};

  const S* partial;
  int64_t rows, row_numbers, offset, count;
  N* result;

  int64_t blocks() const { return ceil_div(count, kWarp); }
  int64_t shared_numbers() const { return kThreads; }

  template <class Block>
  VSOD_BOTH void run(Block& block, uint32_t index) const {
    S* all = block.template shared<S>();
    block.phase([&](int thread, Registers&) {
      const int64_t i = int64_t(index) * kWarp + thread % kWarp;
      S sum = 0;
      if (i < count) {
        VSOD_UNROLL8
        for (int64_t r = thread / kWarp; r < rows; r += kWarps)
          sum += partial[r * row_numbers + offset + i];
      }
      all[thread] = sum;
    });
    block.phase([&](int thread, Registers&) {
      const int64_t i = int64_t(index) * kWarp + thread;
      if (thread >= kWarp || i >= count) return;
      S sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += all[w * kWarp + thread];
      result[i] = N(sum);
    });
  }
};

}  // namespace conv_lstm_cuda
}  // namespace vsod
