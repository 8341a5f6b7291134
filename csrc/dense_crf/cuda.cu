// dense_crf on the GPU: mean field of a fully connected CRF, filtered on permutohedral lattices.
//
// What it computes is in cuda_kernels.h, one struct a launch; the order of launches in cuda_run.h.
// Here: how a struct becomes a launch, the sort and the scan of CUB, and the registration.
//
// Every launch is one thread an index, because every step needs the whole of the step before: a
// blur reads neighbours anywhere, a splat all points of a vertex.  No atomics: all sums have a
// fixed order, so the bits are the same on every run.
//
// Floors, one frame of 512 x 512, a foreground probability (an H200 copies 4.3 TB/s): 2.4 million
// (point, vertex) pairs.  An iteration reads each as an entry (8 bytes: point, weight) for the
// splat and as id and weight (8 bytes) for the slice: 38 MB; logits, norms and z of 262,144 points
// add 6 MB, and 6 blurs of some 100,000 vertices with two neighbours 10 MB: 54 MB = 13 us, less
// where the L2 cache (50 MB) holds it.  9 launches of some 2.5 us are 23 us: one small frame waits
// for launches, so images go through together.  Building sorts 1.6 million keys of 8 bytes with 4
// of payload, 8 bits a pass, some 7 passes: 260 MB = 60 us; neighbours are 12 binary searches a
// vertex.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>

#include "cuda_run.h"

namespace vsod {
namespace dense_crf_cuda {
namespace {

constexpr int kThreads = 256;

template <class Kernel>
__global__ __launch_bounds__(kThreads) void dense_crf_kernel(const __grid_constant__ Kernel kernel,
                                                             int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) kernel(i);
}

struct Launcher {
  cudaStream_t stream;

  template <class Kernel>
  void operator()(const Kernel& kernel) const {
    const int64_t count = kernel.count(), blocks = (count + kThreads - 1) / kThreads;
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks < (int64_t(1) << 31), "dense_crf: too large");
    dense_crf_kernel<<<unsigned(blocks), kThreads, 0, stream>>>(kernel, count);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // The first call with `null` asks how much memory it takes.
  template <class Call>
  static void with_memory(Memory& memory, const Call& call) {
    size_t bytes = 0;
    STD_CUDA_CHECK(call(nullptr, bytes));
    STD_CUDA_CHECK(call(memory.get<char>(int64_t(bytes)), bytes));
  }

  void sort(Memory& memory, uint64_t*& keys, uint32_t*& pairs, int64_t count, int bits) const {
    cub::DoubleBuffer<uint64_t> key(keys, memory.get<uint64_t>(count));
    cub::DoubleBuffer<uint32_t> pair(pairs, memory.get<uint32_t>(count));
    with_memory(memory, [&](void* scratch, size_t& bytes) {
      return cub::DeviceRadixSort::SortPairs(scratch, bytes, key, pair, count, 0, bits, stream);
    });
    keys = key.Current(), pairs = pair.Current();
  }

  void scan(Memory& memory, const int32_t* from, int32_t* to, int64_t count) const {
    with_memory(memory, [&](void* scratch, size_t& bytes) {
      return cub::DeviceScan::InclusiveSum(scratch, bytes, from, to, count, stream);
    });
  }

  int64_t read(const int32_t* from) const {
    int32_t value = 0;
    STD_CUDA_CHECK(cudaMemcpyAsync(&value, from, sizeof(value), cudaMemcpyDeviceToHost, stream));
    STD_CUDA_CHECK(cudaStreamSynchronize(stream));
    return value;
  }
};

Tensor forward_cuda(const Tensor& prob, const Tensor& image, int64_t iterations,
                    double gaussian_sxy, double gaussian_weight, double bilateral_sxy,
                    double bilateral_srgb, double bilateral_weight) {
  const Problem problem{iterations,    gaussian_sxy,   gaussian_weight,
                        bilateral_sxy, bilateral_srgb, bilateral_weight};
  dense_crf::check(Device::kCuda, prob, image, problem);
  const torch::stable::accelerator::DeviceGuard guard(prob.get_device_index());
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(prob.get_device_index(), &stream));
  return forward(Launcher{static_cast<cudaStream_t>(stream)}, prob, image, problem, 0);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vsod_ops, CUDA, m) { m.impl("dense_crf_cuda", TORCH_BOX(&forward_cuda)); }

}  // namespace dense_crf_cuda
}  // namespace vsod
