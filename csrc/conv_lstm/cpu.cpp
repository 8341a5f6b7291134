// Host side of conv_lstm on the CPU: checks, allocation, choice of the SIMD level.
// Schemas are in vsod_ops/conv_lstm/schemas.inc, the contract in op.py beside it, the kernel in
// cpu_kernel.cpp.

#include "cpu.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "../common/levels.h"
#include "../common/parallel.h"
#include "../common/schemas.h"
#include "../common/tensors.h"
#include "cpu_library.h"

namespace vsod {

VSOD_LEVEL_TABLES(const conv_lstm::Kernel*, conv_lstm_kernels)

namespace conv_lstm {
namespace {

constexpr const char* kOp = "conv_lstm";

enum Save { kSaveNothing, kSaveCells, kSaveGates };

Frames frames(const Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.stride(4)};
}

const void* data_of(const MaybeTensor& x) { return x ? x->data_ptr() : nullptr; }

// Checks what the kernel relies on; conv_lstm() in Python says the same with its own words.
Problem problem_of(const Check& check, const Tensor& x, const MaybeTensor& h, const MaybeTensor& c,
                   const Tensor& weight_ih, const Tensor& weight_hh, const MaybeTensor& bias,
                   const MaybeTensor& peephole, int64_t dilation) {
  check.first("x", x, 5);
  check.floating("x", x);
  check.first("weight_hh", weight_hh, 4);
  STD_TORCH_CHECK(x.numel() > 0, kOp, ": x is empty");
  STD_TORCH_CHECK(dilation >= 1, kOp, ": dilation must be at least 1, got ", dilation);
  Problem p{};
  p.batch = x.size(0), p.steps = x.size(1), p.channels = x.size(2);
  p.height = x.size(3), p.width = x.size(4);
  p.hidden = weight_hh.size(1), p.kernel = weight_hh.size(2), p.dilation = dilation;
  STD_TORCH_CHECK(p.hidden >= 1 && p.kernel % 2 == 1, kOp,
                  ": weight_hh must be (4M, M, k, k) with M >= 1 and odd k, got ",
                  text_of(sizes_of(weight_hh)));
  const ScalarType type = x.scalar_type(), state = compute_type(x);
  const int64_t m = p.hidden, k = p.kernel;
  const Sizes image{p.batch, m, p.height, p.width};
  check.fits("h", h, x, type, image, Stride::kContiguous);
  check.fits("c", c, x, state, image, Stride::kContiguous);
  check.fits("weight_ih", weight_ih, x, type, {4 * m, p.channels, k, k}, Stride::kContiguous);
  check.fits("weight_hh", weight_hh, x, type, {4 * m, m, k, k}, Stride::kContiguous);
  check.fits("bias", bias, x, type, {4 * m}, Stride::kContiguous);
  p.full_peephole = peephole && peephole->dim() == 4;
  check.fits("weight_peephole", peephole, x, type,
             p.full_peephole ? Sizes{3, m, p.height, p.width} : Sizes{3, m}, Stride::kContiguous);
  p.x = frames(x);
  p.h = data_of(h), p.c = data_of(c);
  p.weight_ih = weight_ih.data_ptr(), p.weight_hh = weight_hh.data_ptr();
  p.bias = data_of(bias), p.peephole = data_of(peephole);
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, MaybeTensor h, MaybeTensor c,
                                                   const Tensor& weight_ih, const Tensor& weight_hh,
                                                   MaybeTensor bias, MaybeTensor peephole,
                                                   int64_t dilation, int64_t save) {
  const Check check(kOp, Device::kCpu);
  Problem p = problem_of(check, x, h, c, weight_ih, weight_hh, bias, peephole, dilation);
  STD_TORCH_CHECK(save >= kSaveNothing && save <= kSaveGates, kOp, ": save must be 0, 1 or 2, got ",
                  save);
  const Kernel& kernel = *conv_lstm_kernels(dtype_of(x));
  const Allocator allocate(kOp, x);
  const ScalarType type = x.scalar_type(), state = compute_type(x);
  const int64_t b = p.batch, t = p.steps, m = p.hidden, height = p.height, width = p.width;
  Tensor out = allocate.empty({b, t, m, height, width}, type);
  Tensor c_last = allocate.empty({b, m, height, width}, state);
  Tensor cells = allocate.empty_if(save >= kSaveCells, {b, t - 1, m, height, width}, state);
  Tensor gates = allocate.empty_if(save == kSaveGates, {b, t, 4 * m, height, width}, type);
  p.out = out.data_ptr(), p.c_last = c_last.data_ptr();
  // Where cells are not kept, the running state lives in c_last.
  p.cells = save >= kSaveCells ? cells.data_ptr() : nullptr;
  p.gates = save == kSaveGates ? gates.data_ptr() : nullptr;
  if (kernel.library(p)) {
    Library(kOp, kernel, p, x, h, weight_ih, weight_hh, out).forward();
    return {out, c_last, cells, gates};
  }
  Tensor weights = allocate.empty({kernel.forward_weights(p)}, state);
  Tensor offsets = allocate.empty({p.kernel, p.kernel}, ScalarType::Long);
  p.weights = weights.data_ptr();
  p.offsets = static_cast<int64_t*>(offsets.data_ptr());
  check_memory(kOp, kernel.forward(p, on_each_thread));
  return {out, c_last, cells, gates};
}

// Gradients come back in the compute type, but dx and dh, which are in x's.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    MaybeTensor grad_out, MaybeTensor grad_c, const Tensor& x, MaybeTensor h, MaybeTensor c,
    const Tensor& weight_ih, const Tensor& weight_hh, MaybeTensor bias, MaybeTensor peephole,
    const Tensor& out, const Tensor& c_last, const Tensor& cells, const Tensor& gates,
    int64_t dilation, std::vector<bool> needs) {
  const Check check(kOp, Device::kCpu);
  Problem p = problem_of(check, x, h, c, weight_ih, weight_hh, bias, peephole, dilation);
  const Kernel& kernel = *conv_lstm_kernels(dtype_of(x));
  const Allocator allocate(kOp, x);
  const ScalarType type = x.scalar_type(), state = compute_type(x);
  const int64_t b = p.batch, t = p.steps, m = p.hidden, height = p.height, width = p.width;
  const Sizes image{b, m, height, width};
  STD_TORCH_CHECK(needs.size() == 7, kOp, ": needs must have 7 elements, got ", needs.size());
  check.fits("out", out, x, type, {b, t, m, height, width}, Stride::kContiguous);
  check.fits("c_last", c_last, x, state, image, Stride::kContiguous);
  check.fits("cells", cells, x, state, {b, t - 1, m, height, width}, Stride::kContiguous);
  check.fits("grad_out", grad_out, x, type, {b, t, m, height, width}, Stride::kAny);
  check.fits("grad_c", grad_c, x, state, image, Stride::kContiguous);
  const bool kept = gates.dim() != 1;
  check.fits("gates", gates, x, type, kept ? Sizes{b, t, 4 * m, height, width} : Sizes{0},
             Stride::kContiguous);
  p.out = out.data_ptr(), p.c_last = c_last.data_ptr(), p.cells = cells.data_ptr();
  if (kept) p.gates = gates.data_ptr();
  if (grad_out) p.grad_out = frames(*grad_out);

  const auto gradient = [&](bool need, const Sizes& sizes, ScalarType as, void** data) {
    Tensor g = allocate.empty_if(need, sizes, as);
    *data = need ? g.data_ptr() : nullptr;
    return g;
  };
  const int64_t k = p.kernel;
  // Gradients of the state pass from step to step as images, of even and of odd steps.
  Tensor dc = gradient(true, image, state, &p.dc_of[0]);
  Tensor dc_odd = gradient(t > 1, image, state, &p.dc_of[1]);
  p.grad_c = data_of(grad_c);
  Tensor dbias = gradient(needs[5] && bias, {4 * m}, state, &p.dbias);
  Tensor dpeephole =
      gradient(needs[6] && peephole, p.full_peephole ? Sizes{3, m, height, width} : Sizes{3, m},
               state, &p.dpeephole);
  if (kernel.library(p)) {
    MaybeTensor whole;
    if (grad_out) whole = Convolution::contiguous(*grad_out), p.grad_out = frames(*whole);
    Library library(kOp, kernel, p, x, h, weight_ih, weight_hh, out);
    const auto found = library.backward({needs[0], needs[1] && h, needs[3], needs[4]});
    const Tensor none = allocate.empty({0}, type);
    return {found.dx.value_or(none),
            found.dh.value_or(none),
            dc,
            found.weight_ih.value_or(none),
            found.weight_hh.value_or(none),
            dbias,
            dpeephole};
  }

  Tensor dx = gradient(needs[0], {b, t, p.channels, height, width}, type, &p.dx);
  Tensor dh = gradient(needs[1] && h, {b, m, height, width}, type, &p.dh);
  Tensor dh_odd = gradient(t > 1, image, state, &p.dh_of[1]);
  // dx of step 0 is written last: until then dh of even steps lives there.
  const bool in_dx = p.dx && p.channels >= m && type == state;
  Tensor dh_even = gradient(t > 2 && !in_dx, image, state, &p.dh_of[0]);
  p.dh_batch[0] = p.dh_batch[1] = m * height * width;
  if (in_dx) p.dh_of[0] = p.dx, p.dh_batch[0] = dx.stride(0);
  Tensor dweight_ih = gradient(needs[3], {4 * m, p.channels, k, k}, state, &p.dweight_ih);
  Tensor dweight_hh = gradient(needs[4], {4 * m, m, k, k}, state, &p.dweight_hh);

  Tensor weights = allocate.empty({p.gates ? 0 : kernel.forward_weights(p)}, state);
  Tensor back_weights = allocate.empty({kernel.backward_weights(p)}, state);
  p.groups = kernel.groups(p);
  Tensor sums = allocate.empty({p.groups, kernel.group_sums(p)}, state);
  Tensor offsets = allocate.empty({k, k}, ScalarType::Long);
  p.offsets = static_cast<int64_t*>(offsets.data_ptr());
  p.weights = weights.data_ptr(), p.sums = sums.data_ptr();
  p.backward_weights = back_weights.data_ptr();
  check_memory(kOp, kernel.backward(p, on_each_thread));
  return {dx, dh, dc, dweight_ih, dweight_hh, dbias, dpeephole};
}

// The kernel's own sigmoid and tanh, for tests of their accuracy.
std::tuple<Tensor, Tensor> activate(const Tensor& x) {
  const Check check("conv_lstm_activate", Device::kCpu);
  const ScalarType type = compute_type(x);  // the kernel of 16-bit tensors computes in float32
  check.fits("x", x, x, type, sizes_of(x), Stride::kContiguous);
  const Allocator allocate("conv_lstm_activate", x);
  Tensor sigmoid = allocate.empty_like(x), tanh = allocate.empty_like(x);
  conv_lstm_kernels(dtype_of(x))
      ->activate(x.data_ptr(), sigmoid.data_ptr(), tanh.data_ptr(), x.numel());
  return {sigmoid, tanh};
}

// A call that names no backend: as op.py does for the others, with any strides, any dilation, empty
// tensors, and gradients in the dtypes of their tensors.

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

bool is_empty(const Tensor& x) { return x.dim() == 5 && x.numel() == 0; }

// Beyond the image all taps are outside, however far.
int64_t within(int64_t dilation, const Tensor& x) {
  return x.dim() == 5 ? std::min(dilation, std::max(x.size(3), x.size(4))) : dilation;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_unnamed(const Tensor& x, MaybeTensor h,
                                                           MaybeTensor c, const Tensor& weight_ih,
                                                           const Tensor& weight_hh,
                                                           MaybeTensor bias, MaybeTensor peephole,
                                                           int64_t dilation, int64_t save) {
  if (!is_empty(x))
    return forward(x, as_contiguous(h), as_contiguous(c), as_contiguous(weight_ih),
                   as_contiguous(weight_hh), as_contiguous(bias), as_contiguous(peephole),
                   within(dilation, x), save);
  const Allocator allocate(kOp, x);
  const ScalarType type = x.scalar_type(), state = compute_type(x);
  const int64_t b = x.size(0), t = x.size(1), m = weight_hh.size(1);
  const int64_t height = x.size(3), width = x.size(4);
  return {allocate.empty({b, t, m, height, width}, type),
          allocate.empty({b, m, height, width}, state),
          allocate.empty_if(save >= kSaveCells, {b, t - 1, m, height, width}, state),
          allocate.empty_if(save == kSaveGates, {b, t, 4 * m, height, width}, type)};
}

Gradients backward_unnamed(MaybeTensor grad_out, MaybeTensor grad_c, const Tensor& x, MaybeTensor h,
                           MaybeTensor c, const Tensor& weight_ih, const Tensor& weight_hh,
                           MaybeTensor bias, MaybeTensor peephole, const Tensor& out,
                           const Tensor& c_last, const Tensor& cells, const Tensor& gates,
                           int64_t dilation, std::vector<bool> needs) {
  const Allocator allocate(kOp, x);
  size_t i = 0;
  if (is_empty(x)) {
    const auto zeros = [&](const MaybeTensor& of) {
      const bool need = needs.at(i++) && of;
      return allocate.zeros(need ? sizes_of(*of) : Sizes{0}, (of ? *of : x).scalar_type());
    };
    return Gradients{zeros(x),         zeros(h),    zeros(c),       zeros(weight_ih),
                     zeros(weight_hh), zeros(bias), zeros(peephole)};
  }
  const auto [dx, dh, dc, dweight_ih, dweight_hh, dbias, dpeephole] =
      backward(grad_out, as_contiguous(grad_c), x, as_contiguous(h), as_contiguous(c),
               as_contiguous(weight_ih), as_contiguous(weight_hh), as_contiguous(bias),
               as_contiguous(peephole), as_contiguous(out), as_contiguous(c_last),
               as_contiguous(cells), as_contiguous(gates), within(dilation, x), needs);
  const auto like = [&](const Tensor& gradient, const MaybeTensor& of) {
    const ScalarType type = (of ? *of : x).scalar_type();
    if (!needs[i++] || !of) return allocate.empty({0}, type);
    return gradient.scalar_type() == type ? gradient : torch::stable::to(gradient, type);
  };
  return Gradients{like(dx, x),
                   like(dh, h),
                   like(dc, c),
                   like(dweight_ih, weight_ih),
                   like(dweight_hh, weight_hh),
                   like(dbias, bias),
                   like(dpeephole, peephole)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vsod_ops, m) {
  define_all(m,
#include "../../vsod_ops/conv_lstm/schemas.inc"
  );
}

STABLE_TORCH_LIBRARY_IMPL(vsod_ops, CPU, m) {
  m.impl("conv_lstm_cpu", TORCH_BOX(&forward));
  m.impl("conv_lstm_backward_cpu", TORCH_BOX(&backward));
  m.impl("conv_lstm_activate_cpu", TORCH_BOX(&activate));
  if (!level_is_known()) return;
  m.impl("conv_lstm.unnamed", TORCH_BOX(&forward_unnamed));
  m.impl("conv_lstm_backward.unnamed", TORCH_BOX(&backward_unnamed));
}

}  // namespace conv_lstm
}  // namespace vsod
