// What the host side of every op does with tensors: it checks them before a kernel touches a
// pointer, and makes new ones.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "kernel.h"

namespace vsod {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

// More numbers than any memory holds, few enough that no product of sizes overflows.
constexpr int64_t kMostNumbers = int64_t(1) << 48;

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Byte: return "uint8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    default: return "another dtype";
  }
}

inline std::string text_of(const Sizes& sizes) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

inline Sizes sizes_of(const Tensor& x) {
  Sizes sizes;
  for (int64_t d = 0; d < x.dim(); ++d) sizes.push_back(x.size(d));
  return sizes;
}

inline bool has_sizes(const Tensor& x, const Sizes& sizes) {
  bool same = x.dim() == int64_t(sizes.size());
  for (size_t d = 0; same && d < sizes.size(); ++d) same = x.size(int64_t(d)) == sizes[d];
  return same;
}

inline Tensor as_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}
inline MaybeTensor as_contiguous(const MaybeTensor& x) {
  return x ? MaybeTensor(as_contiguous(*x)) : MaybeTensor();
}

inline bool is_floating(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

enum class Device { kCpu, kCuda };
enum class Stride { kAny, kContiguous };

// What an op asks of its tensors: names it in errors, and where they have to be.
class Check {
 public:
  Check(const char* op, Device device) : op_(op), device_(device) {}

  // A tensor that other tensors are compared with.
  void first(const char* name, const Tensor& x, int64_t dim) const {
    check_device(name, x);
    STD_TORCH_CHECK(x.dim() == dim, op_, ": ", name, " must have ", dim, " dimensions, got shape ",
                    text_of(sizes_of(x)));
    STD_TORCH_CHECK(x.numel() <= kMostNumbers, op_, ": ", name, " is too large");
  }

  // On the device of `like`, with this dtype and shape.
  void fits(const std::string& name, const Tensor& x, const Tensor& like, ScalarType type,
            const Sizes& sizes, Stride stride) const {
    check_device(name.c_str(), x);
    STD_TORCH_CHECK(x.get_device_index() == like.get_device_index(), op_, ": ", name,
                    " must be on the same device as the other tensors");
    STD_TORCH_CHECK(x.scalar_type() == type, op_, ": ", name, " must be ", dtype_name(type),
                    ", got ", dtype_name(x.scalar_type()));
    STD_TORCH_CHECK(has_sizes(x, sizes), op_, ": ", name, " must have shape ", text_of(sizes),
                    ", got ", text_of(sizes_of(x)));
    STD_TORCH_CHECK(stride == Stride::kAny || x.is_contiguous(), op_, ": ", name,
                    " must be contiguous");
    STD_TORCH_CHECK(x.numel() <= kMostNumbers, op_, ": ", name, " is too large");
  }
  void fits(const std::string& name, const MaybeTensor& x, const Tensor& like, ScalarType type,
            const Sizes& sizes, Stride stride) const {
    if (x) fits(name, *x, like, type, sizes, stride);
  }

  // What an op that has no kernel for other dtypes takes.
  void floating(const char* name, const Tensor& x) const {
    STD_TORCH_CHECK(is_floating(x), op_, ": ", name,
                    " must be float32, float64, float16 or bfloat16, got ",
                    dtype_name(x.scalar_type()));
  }

 private:
  void check_device(const char* name, const Tensor& x) const {
    const bool there = device_ == Device::kCpu ? x.is_cpu() : x.is_cuda();
    STD_TORCH_CHECK(there, op_, ": ", name, " must be a ", device_ == Device::kCpu ? "CPU" : "CUDA",
                    " tensor");
  }

  const char* op_;
  Device device_;
};

// Entries of the tables of kernels.
inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return kFloat64;
    case ScalarType::Half: return kFloat16;
    case ScalarType::BFloat16: return kBFloat16;
    default: return kFloat32;
  }
}

// What a kernel computes and keeps sums and states in beside tensors of x's dtype.
inline ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Makes tensors beside one; where there is no memory the error names the op and the bytes.
class Allocator {
 public:
  Allocator(const char* op, const Tensor& like) : op_(op), like_(like) {}

  Tensor empty(const Sizes& sizes, ScalarType type) const {
    return attempt(sizes, type, [&] { return torch::stable::new_empty(like_, sizes, type); });
  }
  Tensor zeros(const Sizes& sizes, ScalarType type) const {
    return attempt(sizes, type, [&] { return torch::stable::new_zeros(like_, sizes, type); });
  }
  // Shaped and laid out like x.
  Tensor empty_like(const Tensor& x) const {
    return attempt(sizes_of(x), x.scalar_type(), [&] { return torch::stable::empty_like(x); });
  }
  // The same if it is wanted, else a tensor of shape (0,).
  Tensor empty_if(bool wanted, const Sizes& sizes, ScalarType type) const {
    return empty(wanted ? sizes : Sizes{0}, type);
  }

 private:
  template <class Make>
  Tensor attempt(const Sizes& sizes, ScalarType type, const Make& make) const {
    try {
      return make();
    } catch (const std::exception& error) {
      double bytes = type == ScalarType::Double || type == ScalarType::Long ? 8
                     : type == ScalarType::Float || type == ScalarType::Int ? 4
                     : type == ScalarType::Byte                             ? 1
                                                                            : 2;
      for (const int64_t size : sizes) bytes *= double(size);
      std::ostringstream text;
      text.precision(0);
      text << std::fixed << bytes;
      const std::string why = error.what();
      STD_TORCH_CHECK(false, op_, ": cannot allocate ", text.str(),
                      " bytes: ", why.substr(0, why.find('\n')));
    }
  }

  const char* op_;
  const Tensor& like_;
};

// What a kernel returned: 0, or the bytes that there was no memory for.
inline void check_memory(const char* op, int64_t missing) {
  STD_TORCH_CHECK(missing == 0, op, ": cannot allocate ", missing, " bytes of scratch memory");
}

}  // namespace vsod
