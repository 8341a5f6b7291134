// The CUDA kernels of conv_lstm run on the CPU, for tests: each phase for every thread of a block
// before the next phase, block after block.  Shared memory starts as NaN, so that reading what no
// phase has written shows; with `reverse` threads and blocks run from the last to the first, so
// that results which depend on their order (a missing barrier, a race) differ.

#include <limits>

#include "cuda_run.h"

namespace vsod {
namespace conv_lstm_cuda {
namespace {

template <class Kernel>
struct HostBlock {
  std::vector<typename Kernel::Registers> registers;
  std::vector<Four<typename Kernel::S>> memory;  // aligned as on the GPU
  bool reverse;

  template <class S>
  S* shared() {
    return memory[0].v;
  }
  template <class Phase>
  void phase(const Phase& run) {
    for (int i = 0; i < kThreads; ++i) {
      const int thread = reverse ? kThreads - 1 - i : i;
      run(thread, registers[thread]);
    }
  }
};

struct Launcher {
  bool reverse;

  template <class Kernel>
  void operator()(const Kernel& kernel) const {
    using S = typename Kernel::S;
    constexpr S nan = std::numeric_limits<S>::quiet_NaN();
    const int64_t blocks = kernel.blocks(), numbers = kernel.shared_numbers();
    STD_TORCH_CHECK(numbers * int64_t(sizeof(float)) <= kSharedBytes, Kernel::kName,
                    ": too much shared memory");
    for (int64_t i = 0; i < blocks; ++i) {
      HostBlock<Kernel> block;
      block.registers.resize(kThreads);
      block.memory.assign(ceil_div(numbers, 4), Four<S>{{nan, nan, nan, nan}});
      block.reverse = reverse;
      kernel.run(block, uint32_t(reverse ? blocks - 1 - i : i));
    }
  }
};

ForwardResult forward_on_host(const Tensor& x, const MaybeTensor& h, const MaybeTensor& c,
                              const Tensor& weight_ih, const Tensor& weight_hh,
                              const MaybeTensor& bias, const MaybeTensor& weight_peephole,
                              int64_t dilation, int64_t save, bool reverse) {
  const Arguments a{x, h, c, weight_ih, weight_hh, bias, weight_peephole, dilation};
  return for_dtype<true>(x, [&](auto number) {
    return forward<decltype(number)>(Launcher{reverse}, Device::kCpu, a, save);
  });
}

BackwardResult backward_on_host(const MaybeTensor& grad_out, const MaybeTensor& grad_c,
                                const Tensor& x, const MaybeTensor& h, const MaybeTensor& c,
                                const Tensor& weight_ih, const Tensor& weight_hh,
                                const MaybeTensor& bias, const MaybeTensor& weight_peephole,
                                const Tensor& out, const Tensor& c_last, const Tensor& cells,
                                const Tensor& gates, int64_t dilation, std::vector<bool> needs,
                                int64_t window, bool reverse) {
  const Arguments a{x, h, c, weight_ih, weight_hh, bias, weight_peephole, dilation};
  const Incoming in{grad_out, grad_c, out, c_last, cells, gates};
  return for_dtype<true>(x, [&](auto number) {
    return backward<decltype(number)>(Launcher{reverse}, Device::kCpu, a, in, needs, window);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vsod_ops, CPU, m) {
  m.impl("conv_lstm_cuda_on_host", TORCH_BOX(&forward_on_host));
  m.impl("conv_lstm_backward_cuda_on_host", TORCH_BOX(&backward_on_host));
}

}  // namespace conv_lstm_cuda
}  // namespace vsod
