// Gradients of weights, biases and peepholes.
//
// Weight gradient: a thread keeps 8 outputs x 9 taps of one input channel (72 sums), a block 16
// outputs x 8 channels x 8 rows of threads, and walks over its tiles of 32 x 8 pixels.  Four pixels
// cost 18 input loads and 8 loads of 16 bytes for 288 FMA; the pitches keep them free of bank
// conflicts.  The 8 rows of threads are summed once, at the end.
#pragma once

#include "cuda_tiles.h"

namespace vsod {
namespace conv_lstm_cuda {

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
  int64_t blocks() const { return int64_t(walks) * output_blocks * channel_blocks * tap_blocks; }

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
        const Four<S> d = *reinterpret_cast<const Four<S>*>(gates + kGroups * j * kGatePlane + x);
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
        for (int warp = 0; warp < kWarps; ++warp) sum += all[slot * kThreads + warp * kWarp + lane];
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
