// conv_lstm on the GPU for few channels: the whole sequence, forward and backward.
//
// What it computes is in cuda_forward.h, cuda_backward.h and cuda_weights.h, one struct a kernel,
// on the tiles of cuda_tiles.h, where it says why they are so; the order of launches is in
// cuda_run.h. Here: how a struct becomes a launch, and the registration.
//
// Floors, 4 -> 4 channels, 512 x 512, float32, one sample, one step (an H200 copies 4.3 TB/s and
// does some 60 TFLOP/s of float32 FMA): x, h, c in and h, c out are 80 bytes a pixel = 4.9 us; 1152
// FMA a pixel are 10 us.  With gates kept 144 bytes = 8.8 us.  The backward step reads 4 gates,
// their gradients of the step after, c twice, dc and dout, and writes gradients and dc: 288 bytes =
// 18 us.  16-bit tensors halve all but c and dc, and their FMA run on tensor cores.
//
// Occupancy: 128 threads and at most 128 registers a thread let 4 blocks = 16 warps share a
// multiprocessor; kernels on tensor cores and weight gradients may take 168, 3 blocks.  Shared
// memory, at most 41 KB a block, then stays below the 164 KB of sm_80.

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "cuda_run.h"

namespace vsod {
namespace conv_lstm_cuda {
namespace {

template <class Registers>
struct DeviceBlock {
  Registers registers;
  void* memory;

  template <class S>
  __device__ __forceinline__ S* shared() const {
    return static_cast<S*>(memory);
  }
  template <class Phase>
  __device__ __forceinline__ void phase(const Phase& run) {
    run(int(threadIdx.x), registers);
    __syncthreads();
  }
};

extern __shared__ float4 shared_memory[];

template <class Kernel>
__global__ __launch_bounds__(kThreads, Kernel::kBlocksPerMultiprocessor) void conv_lstm_kernel(
    const __grid_constant__ Kernel kernel) {
  DeviceBlock<typename Kernel::Registers> block{{}, shared_memory};
  kernel.run(block, blockIdx.x);
}

struct Launcher {
  cudaStream_t stream;

  template <class Kernel>
  void operator()(const Kernel& kernel) const {
    const int64_t blocks = kernel.blocks();
    if (blocks == 0) return;
    const size_t bytes = kernel.shared_numbers() * sizeof(typename Kernel::S);
    STD_TORCH_CHECK(blocks < (int64_t(1) << 31) && bytes <= kSharedBytes, Kernel::kName, ": ",
                    blocks, " blocks with ", bytes, " bytes of shared memory");
    conv_lstm_kernel<<<unsigned(blocks), kThreads, bytes, stream>>>(kernel);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

Launcher launcher(const Tensor& x) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return {static_cast<cudaStream_t>(stream)};
}

ForwardResult forward_cuda(const Tensor& x, const MaybeTensor& h, const MaybeTensor& c,
                           const Tensor& weight_ih, const Tensor& weight_hh,
                           const MaybeTensor& bias, const MaybeTensor& weight_peephole,
                           int64_t dilation, int64_t save) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Arguments a{x, h, c, weight_ih, weight_hh, bias, weight_peephole, dilation};
  return for_dtype<false>(x, [&](auto number) {
    return forward<decltype(number)>(launcher(x), Device::kCuda, a, save);
  });
}

BackwardResult backward_cuda(const MaybeTensor& grad_out, const MaybeTensor& grad_c,
                             const Tensor& x, const MaybeTensor& h, const MaybeTensor& c,
                             const Tensor& weight_ih, const Tensor& weight_hh,
                             const MaybeTensor& bias, const MaybeTensor& weight_peephole,
                             const Tensor& out, const Tensor& c_last, const Tensor& cells,
                             const Tensor& gates, int64_t dilation, std::vector<bool> needs) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Arguments a{x, h, c, weight_ih, weight_hh, bias, weight_peephole, dilation};
  const Incoming in{grad_out, grad_c, out, c_last, cells, gates};
  return for_dtype<false>(x, [&](auto number) {
    return backward<decltype(number)>(launcher(x), Device::kCuda, a, in, needs, 0);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vsod_ops, CUDA, m) {
  m.impl("conv_lstm_cuda", TORCH_BOX(&forward_cuda));
  m.impl("conv_lstm_backward_cuda", TORCH_BOX(&backward_cuda));
}

}  // namespace conv_lstm_cuda
}  // namespace vsod
