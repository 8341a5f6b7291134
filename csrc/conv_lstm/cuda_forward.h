// The forward kernel of conv_lstm on a GPU; cuda_tiles.h says how.
#pragma once

#include "cuda_tiles.h"

namespace vsod {
namespace conv_lstm_cuda {

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
      return channel < channels ? S(weight_ih[(row * channels + channel) * taps + tap])
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
      c[p] = before && y0 + p < shape.height ? before[channel * pixels + (y0 + p) * shape.width + x]
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
      const S g = tanh_of(sum[2]);
      const S new_c = f * c[p] + i * g;
      const S o = sigmoid(sum[3] + w[2] * new_c);
      if (write_state) {
        after[pixel] = new_c;
        h[pixel] = N(o * tanh_of(new_c));
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

}  // namespace conv_lstm_cuda
}  // namespace vsod
