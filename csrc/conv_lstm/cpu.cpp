// Host side of conv_lstm on the CPU: checks, allocation, choice of the SIMD level.
// Schemas and the contract are in vsod_ops/conv_lstm/op.py, the kernel in cpu_kernel.cpp.

#include "cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../common/levels.h"
#include "../common/parallel.h"
#include "../common/tensors.h"

namespace vsod {

VSOD_LEVEL_TABLES(const conv_lstm::Kernel*, conv_lstm_kernels)

namespace conv_lstm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

enum Save { kSaveNothing, kSaveCells, kSaveGates };

const Kernel& kernel_for(const Tensor& x) {
  return *conv_lstm_kernels(dtype_of("conv_lstm", "x", x));
}

Frames frames(const Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.stride(4)};
}

const void* data_of(const Optional& x) { return x ? x->data_ptr() : nullptr; }

// What the kernel relies on; conv_lstm() in Python says the same with argument names.
void check(const Tensor& x, const Optional& tensor, const char* name, ScalarType type,
           std::vector<int64_t> shape) {
  if (!tensor) return;
  bool fits = tensor->is_cpu() && tensor->scalar_type() == type && tensor->is_contiguous() &&
              tensor->dim() == int64_t(shape.size());
  for (size_t d = 0; fits && d < shape.size(); ++d) fits = tensor->size(int64_t(d)) == shape[d];
  STD_TORCH_CHECK(fits && x.is_cpu(), "conv_lstm: ", name, " does not fit x");
}

Problem problem_of(const Tensor& x, const Optional& h, const Optional& c, const Tensor& weight_ih,
                   const Tensor& weight_hh, const Optional& bias, const Optional& peephole,
                   int64_t dilation) {
  STD_TORCH_CHECK(x.dim() == 5 && weight_hh.dim() == 4 && x.numel() > 0 && dilation >= 1,
                  "conv_lstm: x must be (B, T, C, H, W), weight_hh (4M, M, k, k)");
  Problem p{};
  p.batch = x.size(0), p.steps = x.size(1), p.channels = x.size(2);
  p.height = x.size(3), p.width = x.size(4);
  p.hidden = weight_hh.size(1), p.kernel = weight_hh.size(2), p.dilation = dilation;
  STD_TORCH_CHECK(p.hidden >= 1 && p.kernel % 2 == 1, "conv_lstm: weight_hh has an even kernel");
  const ScalarType type = x.scalar_type(), state = compute_type(x);
  const int64_t m = p.hidden, k = p.kernel;
  check(x, h, "h", type, {p.batch, m, p.height, p.width});
  check(x, c, "c", state, {p.batch, m, p.height, p.width});
  check(x, weight_ih, "weight_ih", type, {4 * m, p.channels, k, k});
  check(x, weight_hh, "weight_hh", type, {4 * m, m, k, k});
  check(x, bias, "bias", type, {4 * m});
  p.full_peephole = peephole && peephole->dim() == 4;
  check(
      x, peephole, "weight_peephole", type,
      p.full_peephole ? std::vector<int64_t>{3, m, p.height, p.width} : std::vector<int64_t>{3, m});
  p.x = frames(x);
  p.h = data_of(h), p.c = data_of(c);
  p.weight_ih = weight_ih.data_ptr(), p.weight_hh = weight_hh.data_ptr();
  p.bias = data_of(bias), p.peephole = data_of(peephole);
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, Optional h, Optional c,
                                                   const Tensor& weight_ih, const Tensor& weight_hh,
                                                   Optional bias, Optional peephole,
                                                   int64_t dilation, int64_t save) {
  Problem p = problem_of(x, h, c, weight_ih, weight_hh, bias, peephole, dilation);
  const Kernel& kernel = kernel_for(x);
  const ScalarType state = compute_type(x);
  const auto empty = [&](bool wanted, std::vector<int64_t> shape, ScalarType type) {
    return torch::stable::new_empty(x, wanted ? shape : std::vector<int64_t>{0}, type);
  };
  const int64_t b = p.batch, t = p.steps, m = p.hidden, height = p.height, width = p.width;
  Tensor out = empty(true, {b, t, m, height, width}, x.scalar_type());
  Tensor c_last = empty(true, {b, m, height, width}, state);
  Tensor cells = empty(save >= kSaveCells, {b, t - 1, m, height, width}, state);
  Tensor gates = empty(save == kSaveGates, {b, t, 4 * m, height, width}, x.scalar_type());
  Tensor weights = empty(true, {kernel.forward_weights(p)}, state);
  Tensor offsets = empty(true, {p.kernel * p.kernel}, ScalarType::Long);
  p.out = out.data_ptr(), p.c_last = c_last.data_ptr(), p.weights = weights.data_ptr();
  p.offsets = static_cast<int64_t*>(offsets.data_ptr());
  // Where cells are not kept, the running state lives in c_last.
  p.cells = save >= kSaveCells ? cells.data_ptr() : nullptr;
  p.gates = save == kSaveGates ? gates.data_ptr() : nullptr;
  check_memory("conv_lstm", kernel.forward(p, on_each_thread));
  return {out, c_last, cells, gates};
}

// Gradients come back in the compute type, but dx and dh, which are in x's.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Optional grad_out, Optional grad_c, const Tensor& x, Optional h, Optional c,
    const Tensor& weight_ih, const Tensor& weight_hh, Optional bias, Optional peephole,
    const Tensor& out, const Tensor& c_last, const Tensor& cells, const Tensor& gates,
    int64_t dilation, std::vector<bool> needs) {
  Problem p = problem_of(x, h, c, weight_ih, weight_hh, bias, peephole, dilation);
  const Kernel& kernel = kernel_for(x);
  const ScalarType type = x.scalar_type(), state = compute_type(x);
  const int64_t b = p.batch, t = p.steps, m = p.hidden, height = p.height, width = p.width;
  STD_TORCH_CHECK(needs.size() == 7, "conv_lstm: needs must have 7 elements");
  check(x, out, "out", type, {b, t, m, height, width});
  check(x, c_last, "c_last", state, {b, m, height, width});
  check(x, cells, "cells", state, {b, t - 1, m, height, width});
  check(x, grad_c, "grad_c", state, {b, m, height, width});
  p.out = out.data_ptr(), p.c_last = c_last.data_ptr(), p.cells = cells.data_ptr();
  if (gates.dim() == 5) {
    check(x, gates, "gates", type, {b, t, 4 * m, height, width});
    p.gates = gates.data_ptr();
  }
  if (grad_out) {
    bool fits = grad_out->dim() == 5 && grad_out->scalar_type() == type;
    for (int d = 0; fits && d < 5; ++d) fits = grad_out->size(d) == out.size(d);
    STD_TORCH_CHECK(fits, "conv_lstm: grad_out does not fit out");
    p.grad_out = frames(*grad_out);
  }

  const auto gradient = [&](bool need, std::vector<int64_t> shape, ScalarType as, void** data) {
    Tensor g = torch::stable::new_empty(x, need ? shape : std::vector<int64_t>{0}, as);
    *data = need ? g.data_ptr() : nullptr;
    return g;
  };
  const int64_t k = p.kernel;
  Tensor dx = gradient(needs[0], {b, t, p.channels, height, width}, type, &p.dx);
  Tensor dh = gradient(needs[1] && h, {b, m, height, width}, type, &p.dh);
  // Gradients of the state pass from step to step as images, of even and of odd steps.
  const std::vector<int64_t> image{b, m, height, width};
  Tensor dc = gradient(true, image, state, &p.dc_of[0]);
  Tensor dc_odd = gradient(t > 1, image, state, &p.dc_of[1]);
  Tensor dh_odd = gradient(t > 1, image, state, &p.dh_of[1]);
  // dx of step 0 is written last: until then dh of even steps lives there.
  const bool in_dx = p.dx && p.channels >= m && type == state;
  Tensor dh_even = gradient(t > 2 && !in_dx, image, state, &p.dh_of[0]);
  p.dh_batch[0] = p.dh_batch[1] = m * height * width;
  if (in_dx) p.dh_of[0] = p.dx, p.dh_batch[0] = dx.stride(0);
  p.grad_c = data_of(grad_c);
  Tensor dweight_ih = gradient(needs[3], {4 * m, p.channels, k, k}, state, &p.dweight_ih);
  Tensor dweight_hh = gradient(needs[4], {4 * m, m, k, k}, state, &p.dweight_hh);
  Tensor dbias = gradient(needs[5] && bias, {4 * m}, state, &p.dbias);
  Tensor dpeephole = gradient(
      needs[6] && peephole,
      p.full_peephole ? std::vector<int64_t>{3, m, height, width} : std::vector<int64_t>{3, m},
      state, &p.dpeephole);
  if (p.dpeephole) torch::stable::zero_(dpeephole);

  Tensor weights = torch::stable::new_empty(x, {p.gates ? 0 : kernel.forward_weights(p)}, state);
  Tensor back_weights = torch::stable::new_empty(x, {kernel.backward_weights(p)}, state);
  p.groups = kernel.groups(p);
  Tensor sums = torch::stable::new_zeros(x, {p.groups * kernel.group_sums(p)}, state);
  Tensor offsets = torch::stable::new_empty(x, {k * k}, ScalarType::Long);
  p.offsets = static_cast<int64_t*>(offsets.data_ptr());
  p.weights = weights.data_ptr(), p.sums = sums.data_ptr();
  p.backward_weights = back_weights.data_ptr();
  check_memory("conv_lstm", kernel.backward(p, on_each_thread));
  return {dx, dh, dc, dweight_ih, dweight_hh, dbias, dpeephole};
}

// The kernel's own sigmoid and tanh, for tests of their accuracy.
std::tuple<Tensor, Tensor> activate(const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous(), "conv_lstm_activate: x must be contiguous");
  Tensor sigmoid = torch::stable::empty_like(x), tanh = torch::stable::empty_like(x);
  kernel_for(x).activate(x.data_ptr(), sigmoid.data_ptr(), tanh.data_ptr(), x.numel());
  return {sigmoid, tanh};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vsod_ops, CPU, m) {
  m.impl("conv_lstm_cpu", TORCH_BOX(&forward));
  m.impl("conv_lstm_backward_cpu", TORCH_BOX(&backward));
  m.impl("conv_lstm_activate_cpu", TORCH_BOX(&activate));
}

}  // namespace conv_lstm
}  // namespace vsod
