// What a package of `vsod export` calls on each of its inputs: AOTInductor's own code trusts them.

#include <string>
#include <vector>

#include "tensors.h"

namespace vsod {
namespace {

// A contiguous copy of x, which must be float32 with these sizes, none of them under `least`.
Tensor checked_input(const Tensor& x, std::string name, std::vector<int64_t> sizes,
                     std::vector<int64_t> least) {
  constexpr const char* kModel = "exported model";
  const Check check(kModel, Device::kCpu);
  check.first(name.c_str(), x, int64_t(sizes.size()));
  check.fits(name, x, x, ScalarType::Float, sizes, Stride::kAny);
  for (size_t d = 0; d < sizes.size(); ++d)
    STD_TORCH_CHECK(sizes[d] >= least.at(d), kModel, ": ", name, " must be at least ",
                    text_of(least), ", got ", text_of(sizes));
  Tensor copy = Allocator(kModel, x).empty(sizes, ScalarType::Float);
  torch::stable::copy_(copy, x);
  return copy;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vsod_ops, m) {
  m.def("checked_input(Tensor x, str name, SymInt[] sizes, int[] least) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vsod_ops, CPU, m) { m.impl("checked_input", TORCH_BOX(&checked_input)); }

}  // namespace vsod
