// The CUDA kernels of dense_crf run on the CPU, for tests: each for all its indices before the
// next.  With `reverse` from the last index to the first, so that what depends on order differs.

#include <numeric>

#include "cuda_run.h"

namespace vsod {
namespace dense_crf_cuda {
namespace {

struct Launcher {
  bool reverse;

  template <class Kernel>
  void operator()(const Kernel& kernel) const {
    const int64_t count = kernel.count();
    for (int64_t i = 0; i < count; ++i) kernel(reverse ? count - 1 - i : i);
  }

  void sort(Memory&, uint64_t*& keys, uint32_t*& pairs, int64_t count, int bits) const {
    const uint64_t mask = (uint64_t(1) << bits) - 1;
    std::vector<std::pair<uint64_t, uint32_t>> both(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
      STD_TORCH_CHECK((keys[i] & ~mask) == 0, "dense_crf: a key beyond its bits");
      both[size_t(i)] = {keys[i], pairs[i]};
    }
    std::stable_sort(both.begin(), both.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });
    for (int64_t i = 0; i < count; ++i) {
      keys[i] = both[size_t(i)].first;
      pairs[i] = both[size_t(i)].second;
    }
  }

  void scan(Memory&, const int32_t* from, int32_t* to, int64_t count) const {
    std::partial_sum(from, from + count, to);
  }

  int64_t read(const int32_t* from) const { return *from; }
};

Tensor forward_on_host(const Tensor& prob, const Tensor& image, int64_t iterations,
                       double gaussian_sxy, double gaussian_weight, double bilateral_sxy,
                       double bilateral_srgb, double bilateral_weight, int64_t images_at_once,
                       bool reverse) {
  const Problem problem{iterations,    gaussian_sxy,   gaussian_weight,
                        bilateral_sxy, bilateral_srgb, bilateral_weight};
  dense_crf::check(Device::kCpu, prob, image, problem);
  return forward(Launcher{reverse}, prob, image, problem, images_at_once);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vsod_ops, CPU, m) {
  m.impl("dense_crf_cuda_on_host", TORCH_BOX(&forward_on_host));
}

}  // namespace dense_crf_cuda
}  // namespace vsod
