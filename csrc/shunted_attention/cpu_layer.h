// What the layer ShuntedAttention does around its attention, in float32 and without gradients.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "../common/parallel.h"
#include "../common/tensors.h"
#include "cpu_linear.h"

namespace vsod {
namespace shunted_attention {

// Rows up to which a linear layer is the kernel's: for more, a copy of the weights costs the
// library little.
constexpr int64_t kFewRows = 128;

class Projections {
 public:
  Projections(const char* op, const Linear& kernel, const Allocator& allocate)
      : op_(op), kernel_(kernel), allocate_(allocate) {}

  // x (..., depth) contiguous, weight (outputs, depth), bias (outputs,) -> (..., outputs)
  Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& bias) const {
    const int64_t depth = weight.size(1), rows = x.numel() / depth;
    if (rows > kFewRows) return library_linear(x, weight, bias);
    std::vector<int64_t> starts;
    for (int64_t m = 0; m < rows; ++m) starts.push_back(m * depth);
    Sizes sizes = sizes_of(x);
    sizes.back() = weight.size(0);
    return product({data(x), starts.data(), rows, 1, depth}, weight, bias, sizes);
  }

  // A convolution with kernel = stride = rate, the last frame, row and column repeated where the
  // rate does not divide: x (B, T, H, W, C) contiguous, weight (outputs, C, *rate), bias (outputs,)
  // -> (B, ceil(T / rate[0]), ceil(H / rate[1]), ceil(W / rate[2]), outputs)
  Tensor reduce(const Tensor& x, const int64_t* rate, const Tensor& weight,
                const Tensor& bias) const {
    Sizes sizes = sizes_of(x);
    const int64_t frames = sizes[1], height = sizes[2], width = sizes[3], channels = sizes[4];
    for (int d = 0; d < 3; ++d) sizes[d + 1] = (sizes[d + 1] + rate[d] - 1) / rate[d];
    sizes[4] = weight.size(0);
    std::vector<int64_t> starts;
    for (int64_t b = 0; b < sizes[0]; ++b)
      for (int64_t block = 0; block < sizes[1] * sizes[2] * sizes[3]; ++block) {
        const int64_t t = block / (sizes[2] * sizes[3]), h = block / sizes[3] % sizes[2];
        const int64_t w = block % sizes[3];
        for (int64_t part = 0; part < rate[0] * rate[1] * rate[2]; ++part) {
          const int64_t frame = t * rate[0] + part / (rate[1] * rate[2]);
          const int64_t row = h * rate[1] + part / rate[2] % rate[1];
          const int64_t column = w * rate[2] + part % rate[2];
          const int64_t token = (b * frames + std::min(frame, frames - 1)) * height * width +
                                std::min(row, height - 1) * width + std::min(column, width - 1);
          starts.push_back(token * channels);
        }
      }
    const int64_t parts = rate[0] * rate[1] * rate[2], rows = int64_t(starts.size()) / parts;
    return product({data(x), starts.data(), rows, parts, channels}, weight, bias, sizes);
  }

 private:
  static float* data(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

  Tensor product(const Gathered& in, const Tensor& weight, const Tensor& bias,
                 const Sizes& sizes) const {
    const int64_t depth = in.parts * in.channels;
    Tensor out = allocate_.empty(sizes, ScalarType::Float);
    const Tensor packed =
        allocate_.empty({kernel_.packed_numbers(in.rows, depth)}, ScalarType::Float);
    kernel_.pack(in, data(packed), on_each_thread);
    check_memory(op_, kernel_.run(data(packed), in.rows, depth, data(weight), data(bias),
                                  sizes.back(), data(out), on_each_thread));
    return out;
  }

  static Tensor library_linear(const Tensor& x, const Tensor& weight, const Tensor& bias) {
    using torch::stable::detail::from;
    std::array<StableIValue, 3> stack{from(x), from(weight), from(MaybeTensor(bias))};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }

  const char* op_;
  const Linear& kernel_;
  const Allocator& allocate_;
};

}  // namespace shunted_attention
}  // namespace vsod
