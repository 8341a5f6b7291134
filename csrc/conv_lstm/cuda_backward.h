// Gate gradients, and what flows back through the convolutions; cuda_tiles.h says how.
#pragma once

#include "cuda_tiles.h"

namespace vsod {
namespace conv_lstm_cuda {

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
      const S tanh_c = tanh_of(c_after[p]);
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

}  // namespace conv_lstm_cuda
}  // namespace vsod
