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
// Any odd kernel and any dilation: where the tile with its halo does not fit 48 KB with one channel,
// a stage holds one tap (its shifted tile) instead of all.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define VSOD_BOTH __host__ __device__ __forceinline__
#define VSOD_UNROLL _Pragma("unroll")
#define VSOD_UNROLL8 _Pragma("unroll 8")
#else
#define VSOD_BOTH inline
#define VSOD_UNROLL
#define VSOD_UNROLL8
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

// ---- sigmoid and tanh, right from -inf to inf; NaN stays NaN -------------------------------------

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

// ---- which frame, tile and group of output channels a block owns ---------------------------------

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

// ---- convolution ---------------------------------------------------------------------------------

// One stage of a convolution: `chunk` channels and `taps` taps, their inputs and weights in shared
// memory.
struct Stages {
  int chunk, taps, rows, cols;  // rows, cols: of the tile in shared memory

  VSOD_BOTH int tile_numbers() const { return (chunk * rows * cols + 3) / 4 * 4; }
  VSOD_BOTH int numbers(int outputs) const { return tile_numbers() + chunk * taps * outputs; }
};

// What most people use gets kernels with everything known at compile time.
VSOD_BOTH bool is_fast(const Shape& shape) { return shape.kernel == 3 && shape.dilation == 1; }

inline Stages plan_stages(const Shape& shape, int64_t channels, int tile_y, int outputs) {
  const bool fast = is_fast(shape);  // those kernels count on whole chunks
  const int most = int(channels < kChunk && !fast ? channels : kChunk);
  const int64_t rows = tile_y + 2 * int64_t(shape.reach());
  const int64_t cols = kTileX + 2 * int64_t(shape.reach());
  for (int chunk = most; chunk >= 1; --chunk) {
    const int64_t numbers = chunk * (rows * cols + int64_t(shape.taps()) * outputs) + 3;
    if (numbers * 4 <= kSharedBytes) return {chunk, shape.taps(), int(rows), int(cols)};
  }
  return {most, 1, tile_y, kTileX};  // one tap a stage: 32 x 32 x 8 x 4 bytes and 8 weights an output
}

// Phase: channels c0 .. of the input, rows y0 .. and columns x0 .., into tile (chunk, rows, cols).
template <class N, class S>
VSOD_BOTH void fill_tile(int thread, const Input<N>& input, const Shape& shape, int c0, int chunk,
                         int rows, int cols, int64_t y0, int64_t x0, S* tile) {
  const int count = input.channels() - c0 < chunk ? input.channels() - c0 : chunk;
  for (int i = thread; i < rows * cols; i += kThreads) {
    const int64_t y = y0 + i / cols, x = x0 + i % cols;
    const bool inside = y >= 0 && y < shape.height && x >= 0 && x < shape.width;
    const int64_t in_first = y * input.first.y + x * input.first.x;
    const int64_t in_second = y * input.second.y + x * input.second.x;
    S values[kChunk];  // all loads first, so that they are in flight together
    VSOD_UNROLL
    for (int c = 0; c < kChunk; ++c) {
      const int channel = c0 + c, second = channel - input.first.count;
      const N* source = second < 0 ? input.first.data + channel * input.first.c + in_first
                                   : input.second.data + second * input.second.c + in_second;
      values[c] = inside && c < count ? S(*source) : S(0);
    }
    VSOD_UNROLL
    for (int c = 0; c < kChunk; ++c)
      if (c < count) tile[c * rows * cols + i] = values[c];
  }
}

// Phase: sum[p][o] += the taps of `count` channels, for the kRows pixels of this thread.
// kKernel 0: run-time kernel, dilation and columns.
template <int kKernel, int kRows, int kOutputs, class S>
VSOD_BOTH void accumulate(int thread, const S* tile, const S* weights, int count, int plane,
                          int run_cols, int run_kernel, int run_dilation,
                          S (&sum)[kRows][kOutputs]) {
  const int kernel = kKernel ? kKernel : run_kernel;
  const int dilation = kKernel ? 1 : run_dilation;
  const int cols = kKernel ? kTileX + kKernel - 1 : run_cols;
  const S* column = tile + thread / kWarp * kRows * cols + thread % kWarp;
  for (int c = 0; c < count; ++c, column += plane) {
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
          for (int o = 0; o < kOutputs; ++o) sum[p][o] += value * w[o];
        }
      }
    }
  }
}

// All stages of a convolution.  weight(o, channel, tap) is the weight of output o of the block.
template <bool kFast, int kRows, int kOutputs, class N, class Block, class Weight>
VSOD_BOTH void convolve(Block& block, const Shape& shape, const Stages& stages,
                        const Input<N>& input, const Place& at, const Weight& weight) {
  using S = typename Wide<N>::type;
  constexpr int kTileY = kWarps * kRows;
  const int rows = kFast ? kTileY + 2 : stages.rows, cols = kFast ? kTileX + 2 : stages.cols;
  const int chunk = kFast ? kChunk : stages.chunk, taps = kFast ? 9 : stages.taps;
  const bool all_taps = kFast || taps == shape.taps();
  S* tile = block.template shared<S>();
  S* weights = tile + (kFast ? kChunk * rows * cols : stages.tile_numbers());
  const int channels = input.channels();
  for (int c0 = 0; c0 < channels; c0 += chunk) {
    const int count = channels - c0 < chunk ? channels - c0 : chunk;
    for (int tap0 = 0; tap0 < (kFast ? 9 : shape.taps()); tap0 += taps) {
      int64_t y0 = at.y - (kFast ? 1 : shape.reach()), x0 = at.x - (kFast ? 1 : shape.reach());
      if (!all_taps) {
        y0 += int64_t(tap0 / shape.kernel) * shape.dilation;
        x0 += int64_t(tap0 % shape.kernel) * shape.dilation;
      }
      block.phase([&](int thread, auto&) {
        fill_tile(thread, input, shape, c0, chunk, rows, cols, y0, x0, tile);
        for (int i = thread; i < count * taps * kOutputs; i += kThreads) {
          const int o = i % kOutputs, tap = i / kOutputs % taps, c = i / kOutputs / taps;
          weights[i] = weight(o, c0 + c, tap0 + tap);
        }
      });
      block.phase([&](int thread, auto& registers) {
        accumulate<kFast ? 3 : 0>(thread, tile, weights, count, rows * cols, cols,
                                  all_taps ? shape.kernel : 1, shape.dilation, registers.sum);
      });
    }
  }
}

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

// ---- forward -------------------------------------------------------------------------------------

template <class N, bool kFast>
struct ForwardKernel {
  using S = typename Wide<N>::type;
  static constexpr int kRows = 4, kHidden = 4, kOutputs = 4 * kHidden, kTileY = kWarps * kRows;
  static constexpr int kBlocksPerMultiprocessor = 4;
  static constexpr const char* kName = "conv_lstm_fwd_kernel";
  struct Registers {
    S sum[kRows][kOutputs] = {};
  };

  Shape shape;
  Stages stages;
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
  int64_t shared_numbers() const { return stages.numbers(kOutputs); }

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
    convolve<kFast, kRows, kOutputs>(block, shape, stages, sequence.at(shape, batch, step), at,
                                     weight);
    block.phase([&](int thread, Registers& registers) {
      VSOD_UNROLL
      for (int m = 0; m < kHidden; ++m)
        if (m0 + m < hidden) cell(thread, m, m0 + m, batch, step, at, registers);
    });
  }

  // The gate arithmetic of one hidden channel and the pixels of one thread.
  VSOD_BOTH void cell(int thread, int m, int64_t channel, int64_t batch, int64_t step,
                      const Place& at, const Registers& registers) const {
    const int64_t x = at.x + thread % kWarp, y0 = at.y + thread / kWarp * kRows;
    if (x >= shape.width) return;
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
      const S* sum = registers.sum[p] + m;
      S w[3];
      peephole.load(channel, pixel, w);
      const S i = sigmoid(sum[0] + b[0] + w[0] * c[p]);
      const S f = sigmoid(sum[kHidden] + b[1] + w[1] * c[p]);
      const S g = hyperbolic_tangent(sum[2 * kHidden] + b[2]);
      const S new_c = f * c[p] + i * g;
      const S o = sigmoid(sum[3 * kHidden] + b[3] + w[2] * new_c);
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

// ---- backward: gate gradients and what flows through the convolutions ----------------------------

// Outputs j0 .. of a gather convolution: sums over gate gradients with weight (4M, outputs, k, k)
// turned by 180 degrees.
template <bool kFast, int kRows, int kOutputs, class N, class Block>
VSOD_BOTH void gather(Block& block, const Shape& shape, const Stages& stages, const N* gate_frame,
                      const N* weight, int outputs, const Place& at) {
  using S = typename Wide<N>::type;
  const Input<N> input{{gate_frame, shape.pixels(), shape.width, 1, int(4 * shape.hidden)},
                       {nullptr, 0, 0, 0, 0}};
  const int j0 = at.group * kOutputs, taps = kFast ? 9 : shape.taps();
  convolve<kFast, kRows, kOutputs>(
      block, shape, stages, input, at, [&](int j, int channel, int tap) -> S {
        if (j0 + j >= outputs) return 0;
        return S(weight[(int64_t(channel) * outputs + j0 + j) * taps + taps - 1 - tap]);
      });
}

template <class N, bool kFast, int kOutputs>
struct GatherKernel {
  using S = typename Wide<N>::type;
  static constexpr int kRows = 8, kTileY = kWarps * kRows;
  static constexpr int kBlocksPerMultiprocessor = 4;
  static constexpr const char* kName = "conv_lstm_bwd_gather_kernel";
  struct Registers {
    S sum[kRows][kOutputs] = {};
  };

  Shape shape;
  Stages stages;
  Grid grid;
  int64_t first_step, step_count;
  GateFrames<N> gate_gradients;
  const N* weight;  // (4M, outputs, k, k)
  int outputs;
  N* result;        // (B, result_steps, outputs, H, W), written from step first_step on
  int64_t result_steps;

  int64_t blocks() const { return grid.blocks(); }
  int64_t shared_numbers() const { return stages.numbers(kOutputs); }

  template <class Block>
  VSOD_BOTH void run(Block& block, uint32_t index) const {
    const Place at = place(grid, index, kTileY);
    const int64_t batch = at.frame / step_count, step = first_step + at.frame % step_count;
    gather<kFast, kRows, kOutputs>(block, shape, stages, gate_gradients.at(shape, batch, step),
                                   weight, outputs, at);
    block.phase([&](int thread, Registers& registers) {
      const int64_t x = at.x + thread % kWarp, y0 = at.y + thread / kWarp * kRows;
      if (x >= shape.width) return;
      N* frame = result + (batch * result_steps + step) * outputs * shape.pixels();
      VSOD_UNROLL
      for (int j = 0; j < kOutputs; ++j) {
        const int64_t channel = at.group * kOutputs + j;
        VSOD_UNROLL
        for (int p = 0; p < kRows; ++p)
          if (channel < outputs && y0 + p < shape.height)
            frame[channel * shape.pixels() + (y0 + p) * shape.width + x] = N(registers.sum[p][j]);
      }
    });
  }
};

template <class N, bool kFast, int kOutputs>
struct StepBackwardKernel {
  using S = typename Wide<N>::type;
  static constexpr int kRows = 8, kTileY = kWarps * kRows;
  static constexpr int kTogether = 4;  // pixels whose loads are in flight together
  static constexpr int kBlocksPerMultiprocessor = 4;
  static constexpr const char* kName = "conv_lstm_bwd_step_kernel";
  struct Registers {
    S sum[kRows][kOutputs] = {};
  };

  Shape shape;
  Stages stages;
  Grid grid;
  int64_t step;
  Frames<N> grad_out;        // data null: zeros
  const S* grad_c;           // (B, M, H, W) at the last step, null: zeros
  S* dc;                     // (B, M, H, W), from step to step
  GateFrames<const N> gates;  // may be the memory of gate_gradients
  GateFrames<N> gate_gradients;
  Cells<S> cells;
  const N* weight_hh;
  Peephole<N> peephole;

  int64_t blocks() const { return grid.blocks(); }
  int64_t shared_numbers() const { return stages.numbers(kOutputs); }

  template <class Block>
  VSOD_BOTH void run(Block& block, uint32_t index) const {
    const Place at = place(grid, index, kTileY);
    if (step + 1 < shape.steps)
      gather<kFast, kRows, kOutputs>(block, shape, stages,
                                     static_cast<const N*>(gate_gradients.at(shape, at.frame, step + 1)),
                                     weight_hh, int(shape.hidden), at);
    block.phase([&](int thread, Registers& registers) {
      VSOD_UNROLL
      for (int j = 0; j < kOutputs; ++j) {
        const int64_t channel = at.group * kOutputs + j;
        if (channel >= shape.hidden) break;
        VSOD_UNROLL
        for (int p = 0; p < kRows; p += kTogether) cell(thread, p, j, channel, at, registers);
      }
    });
  }

  // Gate gradients of one hidden channel and kTogether pixels, rows p0 .. of the thread's.
  VSOD_BOTH void cell(int thread, int p0, int j, int64_t channel, const Place& at,
                      const Registers& registers) const {
    const int64_t x = at.x + thread % kWarp, y0 = at.y + thread / kWarp * kRows + p0;
    const int64_t batch = at.frame;
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
      dh[p] = registers.sum[p0 + p][j] + (grad_out.data ? S(grad[p * grad_out.y]) : S(0));
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

// ---- weight gradient -----------------------------------------------------------------------------

// Taps of a block: all nine of an undilated 3 x 3 kernel (kFast), else up to three of one row.
template <class N, bool kFast>
struct WeightKernel {
  using S = typename Wide<N>::type;
  static constexpr int kTileY = 8, kGroups = 2, kPerThread = 8;
  static constexpr int kOutputs = kGroups * kPerThread;  // gate channels a block
  static constexpr int kTapRows = kFast ? 3 : 1, kTaps = 3 * kTapRows;
  static constexpr int kSums = kPerThread * kTaps;
  static constexpr int kPairs = kGroups * kChunk;        // threads of one row of pixels
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

  Shape shape;
  int64_t first_step, step_count;
  Sequence<N> sequence;
  GateFrames<const N> gate_gradients;
  S* partial;           // (walks, row_numbers(shape))
  bool add;             // to what is there, or overwrite it
  uint32_t walks;       // blocks that share the tiles
  uint32_t output_blocks, channel_blocks, tap_blocks;

  // dW_ih, dW_hh, db, one after the other.
  VSOD_BOTH static int64_t row_numbers(const Shape& s) {
    return 4 * s.hidden * ((s.channels + s.hidden) * s.taps() + 1);
  }
  static uint32_t tap_block_count(const Shape& s) {
    return kFast ? 1 : uint32_t(s.kernel * ceil_div(s.kernel, 3));
  }
  int64_t blocks() const {
    return int64_t(walks) * output_blocks * channel_blocks * tap_blocks;
  }
  int64_t shared_numbers() const {
    return kTileNumbers > kReduceNumbers ? kTileNumbers : kReduceNumbers;
  }

  template <class Block>
  VSOD_BOTH void run(Block& block, uint32_t index) const {
    const int o0 = int(index % output_blocks) * kOutputs;
    index /= output_blocks;
    const int c0 = int(index % channel_blocks) * kChunk;
    index /= channel_blocks;
    const int tap_block = int(index % tap_blocks);
    const uint32_t walk = index / tap_blocks;
    const int kernel = kFast ? 3 : shape.kernel, tap_columns = (kernel + 2) / 3;
    const int ky = kFast ? 0 : tap_block / tap_columns;
    const int kx = kFast ? 0 : tap_block % tap_columns * 3;
    const bool with_bias = c0 == 0 && tap_block == 0;
    S* gate_tile = block.template shared<S>();
    S* input_tile = gate_tile + kGateNumbers;

    const uint32_t tiles_x = uint32_t((shape.width + kTileX - 1) / kTileX);
    const uint32_t tiles_y = uint32_t((shape.height + kTileY - 1) / kTileY);
    const uint32_t tiles = uint32_t(shape.batch * step_count) * tiles_y * tiles_x;
    for (uint32_t tile = walk; tile < tiles; tile += walks) {
      const Place at = place(Grid{0, tiles_y, tiles_x, 1}, tile, kTileY);
      const int64_t batch = at.frame / step_count, step = first_step + at.frame % step_count;
      const Input<N> input = sequence.at(shape, batch, step);
      const N* gates = gate_gradients.at(shape, batch, step);
      block.phase([&](int thread, Registers&) {
        fill_gates(thread, gates, o0, at, gate_tile);
        fill_input(thread, input, c0, ky, kx, at, input_tile);
      });
      block.phase([&](int thread, Registers& registers) {
        add_tile(thread, gate_tile, input_tile, with_bias, registers);
      });
    }

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
      for (int i = thread; i < kPairs * (kSums + 1); i += kThreads) {
        const int pair = i % kPairs, slot = i / kPairs;
        const int64_t place_in_row = target(o0, c0, ky, kx, pair, slot, with_bias);
        if (place_in_row < 0) continue;
        S sum = 0;
        for (int row = 0; row < kTileY; ++row) sum += all[slot * kThreads + row * kPairs + pair];
        S* to = partial + walk * row_numbers(shape) + place_in_row;
        *to = add ? *to + sum : sum;
      }
    });
  }

  VSOD_BOTH static int row_of(int thread) { return thread / kPairs; }
  VSOD_BOTH static int group_of(int thread) { return thread % kPairs / kChunk; }
  VSOD_BOTH static int channel_of(int thread) { return thread % kChunk; }

  // Where sum `slot` of a pair (output group, channel) goes in a row of `partial`; -1: nowhere.
  VSOD_BOTH int64_t target(int o0, int c0, int ky, int kx, int pair, int slot,
                           bool with_bias) const {
    const int group = pair / kChunk, c = pair % kChunk, channels = int(shape.channels);
    const int inputs = channels + int(shape.hidden), taps = kFast ? 9 : shape.taps();
    const int64_t outputs = 4 * shape.hidden;
    if (slot == kSums) {  // each channel's thread has summed one gate channel for the bias
      const int64_t o = o0 + group + kGroups * c;
      return with_bias && o < outputs ? outputs * inputs * taps + o : -1;
    }
    const int64_t o = o0 + group + kGroups * (slot / kTaps);
    const int channel = c0 + c, tap = slot % kTaps;
    const int tap_x = kx + tap % 3, tap_y = ky + tap / 3;
    if (o >= outputs || channel >= inputs || tap_x >= (kFast ? 3 : shape.kernel)) return -1;
    const int64_t in_kernel = tap_y * (kFast ? 3 : shape.kernel) + tap_x;
    if (channel < channels) return (o * channels + channel) * taps + in_kernel;
    return (outputs * channels + o * shape.hidden + channel - channels) * taps + in_kernel;
  }

  VSOD_BOTH void fill_gates(int thread, const N* gates, int o0, const Place& at, S* tile) const {
    const int x = thread % kWarp;
    for (int y = thread / kWarp; y < kTileY; y += kWarps) {
      const bool inside = at.y + y < shape.height && at.x + x < shape.width;
      const N* source = gates + (at.y + y) * shape.width + at.x + x;
      VSOD_UNROLL
      for (int o = 0; o < kOutputs; ++o)
        tile[o * kGatePlane + y * kGatePitch + x] =
            inside && o0 + o < 4 * shape.hidden ? S(source[(o0 + o) * shape.pixels()]) : S(0);
    }
  }

  VSOD_BOTH void fill_input(int thread, const Input<N>& input, int c0, int ky, int kx,
                            const Place& at, S* tile) const {
    constexpr int kCols = kFast ? kTileX + 2 : kTileX, kRows = kFast ? kTileY + 2 : kTileY;
    const int reach = kFast ? 1 : shape.reach(), copies = kFast ? 1 : 3;
    for (int copy = 0; copy < copies; ++copy, tile += kChunk * kInputPlane) {
      const bool real = kFast || kx + copy < shape.kernel;
      const int64_t y0 = at.y - reach + (kFast ? 0 : int64_t(ky) * shape.dilation);
      const int64_t x0 = at.x - reach + (kFast ? 0 : int64_t(kx + copy) * shape.dilation);
      for (int i = thread; i < kRows * kCols; i += kThreads) {
        const int64_t y = y0 + i / kCols, x = x0 + i % kCols;
        const bool inside = real && y >= 0 && y < shape.height && x >= 0 && x < shape.width;
        const int64_t in_first = y * input.first.y + x * input.first.x;
        const int64_t in_second = y * input.second.y + x * input.second.x;
        S values[kChunk];
        VSOD_UNROLL
        for (int c = 0; c < kChunk; ++c) {
          const int channel = c0 + c, second = channel - input.first.count;
          const N* source = second < 0 ? input.first.data + channel * input.first.c + in_first
                                       : input.second.data + second * input.second.c + in_second;
          values[c] = inside && second < input.second.count ? S(*source) : S(0);
        }
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

// ---- peephole gradient and the sum of partial sums -----------------------------------------------

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
