// The launches of a forward and a backward of conv_lstm, on tensors.  Used with two launchers: that
// of cuda.cu launches on a GPU, that of cuda_on_host.cpp runs the phases on the CPU for tests.
//
// Forward: one launch a step.  Backward: the steps from the last to the first, in windows of as
// many as make some 2^20 pixels.  In a window: the gates of all its steps again (recompute), one
// launch a step, then one launch each for the weight, peephole and input gradients of all its
// steps.  So gate gradients are kept for a window and one step, not for all T, and small maps still
// fill the GPU.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../common/tensors.h"
#include "cuda_backward.h"
#include "cuda_forward.h"
#include "cuda_weights.h"

namespace vsod {
namespace conv_lstm_cuda {

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kSaveCells = 1, kSaveGates = 2;  // as in op.py
constexpr int64_t kWindowPixels = int64_t(1) << 20;
constexpr int64_t kWeightBlocks = 1056;  // some 8 a multiprocessor; the same on every GPU, so that
                                         // the order of sums is

constexpr const char* kOp = "conv_lstm";
constexpr int64_t kMostSide = int64_t(1) << 20;  // of x and the kernel's reach: they are ints

struct Arguments {
  const Tensor& x;
  const MaybeTensor &h, &c;
  const Tensor &weight_ih, &weight_hh;
  const MaybeTensor &bias, &weight_peephole;
  int64_t dilation;
};

template <class T>
T* pointer(const MaybeTensor& x) {
  return x.has_value() ? static_cast<T*>(x->data_ptr()) : nullptr;
}
template <class T>
T* pointer(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// What the kernels rely on; conv_lstm() in Python says the same with its own words.
inline Shape check_arguments(const Check& check, const Arguments& a) {
  check.first("x", a.x, 5);
  check.first("weight_hh", a.weight_hh, 4);
  STD_TORCH_CHECK(a.x.numel() > 0, kOp, ": x is empty");
  const int64_t m = a.weight_hh.size(1), k = a.weight_hh.size(2);
  STD_TORCH_CHECK(m >= 1 && m <= kMostSide && k % 2 == 1 && k < 1024, kOp,
                  ": weight_hh must be (4M, M, k, k) with M >= 1 and odd k below 1024, got ",
                  text_of(sizes_of(a.weight_hh)));
  STD_TORCH_CHECK(a.dilation >= 1, kOp, ": dilation must be at least 1, got ", a.dilation);
  STD_TORCH_CHECK(a.x.size(2) <= kMostSide && a.x.size(3) <= kMostSide && a.x.size(4) <= kMostSide,
                  kOp, ": x is too large for one launch");
  // A tap further away than the other end of the image is outside of it, however much further.
  const int64_t dilation = std::min(a.dilation, std::max(a.x.size(3), a.x.size(4)));
  const Shape s{a.x.size(0), a.x.size(1), a.x.size(2), m,
                a.x.size(3), a.x.size(4), int(k),      int(dilation)};
  const ScalarType dtype = a.x.scalar_type();
  const Sizes image{s.batch, m, s.height, s.width};
  check.fits("weight_ih", a.weight_ih, a.x, dtype, {4 * m, s.channels, k, k}, Stride::kContiguous);
  check.fits("weight_hh", a.weight_hh, a.x, dtype, {4 * m, m, k, k}, Stride::kContiguous);
  check.fits("bias", a.bias, a.x, dtype, {4 * m}, Stride::kContiguous);
  check.fits("h", a.h, a.x, dtype, image, Stride::kContiguous);
  check.fits("c", a.c, a.x, compute_type(a.x), image, Stride::kContiguous);
  const bool full = a.weight_peephole && a.weight_peephole->dim() == 4;
  check.fits("weight_peephole", a.weight_peephole, a.x, dtype,
             full ? Sizes{3, m, s.height, s.width} : Sizes{3, m}, Stride::kContiguous);
  const Grid most = make_grid(s, 1, WeightTask<float, true>::kTileY, ceil_div(m, 4));
  STD_TORCH_CHECK(double(most.blocks()) * double(s.batch) * double(s.steps) < 2147483648.0, kOp,
                  ": too many pixels for one launch");
  return s;
}

inline bool is_full(const MaybeTensor& weight_peephole) {
  return weight_peephole.has_value() && weight_peephole->dim() == 4;
}

template <class N>
Peephole<N> make_peephole(const Arguments& a, const Shape& s) {
  const int64_t numbers = is_full(a.weight_peephole) ? s.pixels() : 1;
  return {pointer<const N>(a.weight_peephole), s.hidden * numbers, numbers, numbers > 1 ? 1 : 0};
}

template <class N>
Frames<N> make_frames(const Tensor& x) {
  return {pointer<const N>(x), x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.stride(4)};
}

// Calls f(N()) for the dtype N of x.
template <bool kWithDouble, class F>
auto for_dtype(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float());
    case ScalarType::Half: return f(torch::headeronly::Half());
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16());
    default: break;
  }
  if constexpr (kWithDouble)
    if (x.scalar_type() == ScalarType::Double) return f(double());
  STD_TORCH_CHECK(false, "conv_lstm: x has a dtype that this backend does not take");
}

template <class N, bool kFast, class Launcher>
void launch_forward(const Launcher& launch, const Arguments& a, const Shape& s, int64_t first_step,
                    int64_t step_count, const Tensor& out,
                    const Cells<typename Wide<N>::type>& cells, bool write_state, N* gates,
                    int64_t slots) {
  using Kernel = ForwardKernel<N, kFast>;
  Kernel k{};
  k.shape = s;
  k.convolution = Kernel::Conv::plan(s, s.channels + s.hidden);
  k.grid = make_grid(s, s.batch * step_count, Kernel::kTileY, ceil_div(s.hidden, Kernel::kHidden));
  k.first_step = first_step, k.step_count = step_count;
  k.sequence = {make_frames<N>(a.x), pointer<const N>(a.h), pointer<const N>(out)};
  k.weight_ih = pointer<const N>(a.weight_ih), k.weight_hh = pointer<const N>(a.weight_hh);
  k.bias = pointer<const N>(a.bias);
  k.peephole = make_peephole<N>(a, s);
  k.cells = cells;
  k.write_state = write_state;
  k.out = pointer<N>(out);
  k.gates = {gates, slots};
  launch(k);
}

template <class N, class Launcher>
ForwardResult forward(const Launcher& launch, Device device, const Arguments& a, int64_t save) {
  using S = typename Wide<N>::type;
  const Shape s = check_arguments(Check(kOp, device), a);
  STD_TORCH_CHECK(save >= 0 && save <= kSaveGates, kOp, ": save must be 0, 1 or 2, got ", save);
  const int64_t numbers = s.hidden * s.pixels();
  const ScalarType wide = compute_type(a.x);
  const Allocator allocate(kOp, a.x);
  const auto make = [&](const Sizes& sizes, ScalarType dtype) {
    return allocate.empty(sizes, dtype);
  };
  std::vector<int64_t> kept_sizes{0}, gate_sizes{0};
  if (save >= kSaveCells) kept_sizes = {s.batch, s.steps - 1, s.hidden, s.height, s.width};
  if (save == kSaveGates) gate_sizes = {s.batch, s.steps, 4 * s.hidden, s.height, s.width};
  Tensor out = make({s.batch, s.steps, s.hidden, s.height, s.width}, a.x.scalar_type());
  Tensor c_last = make({s.batch, s.hidden, s.height, s.width}, wide);
  Tensor kept = make(kept_sizes, wide), gates = make(gate_sizes, a.x.scalar_type());
  Cells<S> cells{pointer<const S>(a.c), pointer<S>(c_last), pointer<S>(c_last), numbers, 0};
  if (save >= kSaveCells) {
    cells.between = pointer<S>(kept);
    cells.b = (s.steps - 1) * numbers, cells.t = numbers;
  }
  N* gate_memory = save == kSaveGates ? pointer<N>(gates) : nullptr;
  for (int64_t t = 0; t < s.steps; ++t) {
    if (is_fast(s))
      launch_forward<N, true>(launch, a, s, t, 1, out, cells, true, gate_memory, s.steps);
    else launch_forward<N, false>(launch, a, s, t, 1, out, cells, true, gate_memory, s.steps);
  }
  return {out, c_last, kept, gates};
}

struct Incoming {
  const MaybeTensor &grad_out, &grad_c;
  const Tensor &out, &c_last, &cells, &gates;
};

// Calls run(fast, outputs), constants both: what a gather of `outputs` channels is compiled for.
template <class N, class F>
void for_gather(const Shape& s, int64_t outputs, const F& run) {
  constexpr int kFew = kTensorCores<N> ? 8 : 4;
  if (!is_fast(s)) run(std::false_type(), std::integral_constant<int, kFew>());
  else if (outputs <= kFew) run(std::true_type(), std::integral_constant<int, kFew>());
  else run(std::true_type(), std::integral_constant<int, 8>());
}

template <class N, class Launcher>
void launch_gather(const Launcher& launch, const Shape& s,
                   const GateFrames<const N>& gate_gradients, int64_t first_step,
                   int64_t step_count, const Tensor& weight, N* result, int64_t result_steps) {
  for_gather<N>(s, weight.size(1), [&](auto fast, auto outputs) {
    using Kernel = GatherKernel<N, fast, outputs>;
    Kernel k{};
    k.shape = s;
    k.gather = {Kernel::Conv::plan(s, 4 * s.hidden), pointer<const N>(weight), int(weight.size(1))};
    k.grid = make_grid(s, s.batch * step_count, Kernel::kTileY, ceil_div(weight.size(1), outputs));
    k.first_step = first_step, k.step_count = step_count;
    k.gate_gradients = gate_gradients;
    k.result = result;
    k.result_steps = result_steps;
    launch(k);
  });
}

template <class N, class Launcher>
void launch_step(const Launcher& launch, const Arguments& a, const Incoming& in, const Shape& s,
                 int64_t step, const Cells<typename Wide<N>::type>& cells,
                 const GateFrames<const N>& gates, const GateFrames<N>& gate_gradients,
                 typename Wide<N>::type* dc) {
  using S = typename Wide<N>::type;
  for_gather<N>(s, s.hidden, [&](auto fast, auto outputs) {
    using Kernel = StepBackwardKernel<N, fast, outputs>;
    Kernel k{};
    k.shape = s;
    k.gather = {Kernel::Conv::plan(s, 4 * s.hidden), pointer<const N>(a.weight_hh), int(s.hidden)};
    k.grid = make_grid(s, s.batch, Kernel::kTileY, ceil_div(s.hidden, outputs));
    k.step = step;
    if (in.grad_out.has_value()) k.grad_out = make_frames<N>(*in.grad_out);
    k.grad_c = pointer<const S>(in.grad_c);
    k.dc = dc;
    k.gates = gates, k.gate_gradients = gate_gradients;
    k.cells = cells;
    k.peephole = make_peephole<N>(a, s);
    launch(k);
  });
}

// Calls run(fast, gate tiles), constants both: what a weight gradient is compiled for.
template <class N, class F>
void for_weight(const Shape& s, const F& run) {
  constexpr int kMost = kTensorCores<N> ? 2 : 1;
  if (!is_fast(s)) run(std::false_type(), std::integral_constant<int, 1>());
  else if (s.hidden <= 4) run(std::true_type(), std::integral_constant<int, 1>());
  else run(std::true_type(), std::integral_constant<int, kMost>());
}

// Launches the weight gradient of some steps into `partial`, or where `partial` is null only says
// how many blocks share its pixels.
template <class N, class Launcher>
int64_t launch_weight(const Launcher& launch, const Shape& s, const Sequence<N>& sequence,
                      const GateFrames<const N>& gate_gradients, int64_t first_step,
                      int64_t step_count, int64_t walks, bool add,
                      typename Wide<N>::type* partial) {
  for_weight<N>(s, [&](auto fast, auto gate_tiles) {
    using Kernel = WeightKernel<N, fast, gate_tiles>;
    Kernel k{};
    k.shape = s;
    k.first_step = first_step, k.step_count = step_count;
    k.sequence = sequence;
    k.gate_gradients = gate_gradients;
    k.partial = partial;
    k.add = add;
    k.walks = uint32_t(walks);
    k.output_blocks = uint32_t(ceil_div(4 * s.hidden, Kernel::kOutputs));
    k.channel_blocks = uint32_t(ceil_div(s.channels + s.hidden, kChunk));
    k.tap_blocks = uint32_t(Kernel::tap_block_count(s));
    if (partial) {
      launch(k);
    } else {
      const int64_t tiles =
          s.batch * step_count * ceil_div(s.height, Kernel::kTileY) * ceil_div(s.width, kTileX);
      const int64_t others = int64_t(k.output_blocks) * k.channel_blocks * k.tap_blocks;
      walks = std::max<int64_t>(1, std::min(tiles, kWeightBlocks / others));
    }
  });
  return walks;
}

template <class N, class Launcher>
void reduce(const Launcher& launch, const Tensor& partial, int64_t offset, const Tensor& result) {
  using S = typename Wide<N>::type;
  launch(ReduceKernel<N>{pointer<const S>(partial), partial.size(0), partial.size(1), offset,
                         result.numel(), pointer<N>(result)});
}

// What backward gets beside the arguments of forward.
inline void check_kept(const Check& check, const Arguments& a, const Incoming& in, const Shape& s,
                       const std::vector<bool>& needs) {
  const ScalarType dtype = a.x.scalar_type(), wide = compute_type(a.x);
  const Sizes image{s.batch, s.hidden, s.height, s.width};
  const Sizes images{s.batch, s.steps, s.hidden, s.height, s.width};
  STD_TORCH_CHECK(needs.size() == 7, kOp, ": needs must have 7 elements, got ", needs.size());
  check.fits("out", in.out, a.x, dtype, images, Stride::kContiguous);
  check.fits("c_last", in.c_last, a.x, wide, image, Stride::kContiguous);
  check.fits("cells", in.cells, a.x, wide, {s.batch, s.steps - 1, s.hidden, s.height, s.width},
             Stride::kContiguous);
  check.fits(
      "gates", in.gates, a.x, dtype,
      in.gates.dim() == 1 ? Sizes{0} : Sizes{s.batch, s.steps, 4 * s.hidden, s.height, s.width},
      Stride::kContiguous);
  check.fits("grad_out", in.grad_out, a.x, dtype, images, Stride::kAny);
  check.fits("grad_c", in.grad_c, a.x, wide, image, Stride::kContiguous);
}

// Launches the peephole gradient of some steps into `partial`, with a row for each of `chunks`.
template <class N, class Launcher>
void launch_peephole(const Launcher& launch, const Shape& s,
                     const GateFrames<const N>& gate_gradients,
                     const Cells<typename Wide<N>::type>& cells, int64_t first_step,
                     int64_t step_count, bool full, int64_t chunks, bool add,
                     typename Wide<N>::type* partial) {
  PeepholeKernel<N> k{};
  k.shape = s;
  k.first_step = first_step, k.step_count = step_count;
  k.gate_gradients = gate_gradients;
  k.cells = cells;
  k.full = full, k.add = add;
  k.per_block = full ? kThreads : ceil_div(s.pixels(), chunks);
  k.chunks = uint32_t(chunks);
  k.partial = partial;
  launch(k);
}

// window: steps whose gate gradients are kept at a time; 0 lets kWindowPixels decide.
template <class N, class Launcher>
BackwardResult backward(const Launcher& launch, Device device, const Arguments& a,
                        const Incoming& in, const std::vector<bool>& needs, int64_t window) {
  using S = typename Wide<N>::type;
  const Check check(kOp, device);
  const Shape s = check_arguments(check, a);
  const bool fast = is_fast(s), again = in.gates.dim() == 1;
  const int64_t numbers = s.hidden * s.pixels(), gate_numbers = 4 * s.hidden;
  const ScalarType dtype = a.x.scalar_type(), wide = compute_type(a.x);
  check_kept(check, a, in, s, needs);
  const Allocator allocate(kOp, a.x);
  const auto make = [&](const Sizes& sizes, ScalarType type) {
    return allocate.empty(sizes, type);
  };
  const auto gradient = [&](int index, const MaybeTensor& like) {
    return needs[index] && like.has_value() ? allocate.empty_like(*like) : make({0}, dtype);
  };
  std::vector<int64_t> dx_sizes{0};
  if (needs[0]) dx_sizes = {s.batch, s.steps, s.channels, s.height, s.width};
  Tensor dx = make(dx_sizes, dtype);
  Tensor dh = gradient(1, a.h);
  Tensor dc = make({s.batch, s.hidden, s.height, s.width}, wide);
  Tensor dweight_ih = gradient(3, a.weight_ih), dweight_hh = gradient(4, a.weight_hh);
  Tensor dbias = gradient(5, a.bias), dpeephole = gradient(6, a.weight_peephole);

  if (window <= 0) window = ceil_div(kWindowPixels, s.batch * s.pixels());
  window = std::min(window, s.steps);
  const int64_t slots = std::min(s.steps, window + 1);
  Tensor kept_gradients = make({s.batch, slots, gate_numbers, s.height, s.width}, dtype);
  const GateFrames<N> gate_gradients{pointer<N>(kept_gradients), slots};
  const GateFrames<const N> read_gradients{gate_gradients.data, slots};
  const GateFrames<const N> gates =
      again ? read_gradients : GateFrames<const N>{pointer<const N>(in.gates), s.steps};
  const Cells<S> cells{pointer<const S>(a.c), pointer<S>(in.c_last), pointer<S>(in.cells),
                       (s.steps - 1) * numbers, numbers};
  const Sequence<N> sequence{make_frames<N>(a.x), pointer<const N>(a.h), pointer<const N>(in.out)};

  const bool weights = needs[3] || needs[4] || dbias.numel() > 0;
  const int64_t walks =
      launch_weight<N>(launch, s, sequence, read_gradients, 0, window, 0, false, nullptr);
  Tensor partial = make({weights ? walks : 0, WeightTask<N, true>::row_numbers(s)}, wide);
  const bool peepholes = dpeephole.numel() > 0, full = is_full(a.weight_peephole);
  const int64_t chunks =
      full ? ceil_div(s.pixels(), kThreads) : std::min<int64_t>(64, ceil_div(s.pixels(), 1024));
  Tensor peephole_partial =
      make({peepholes ? (full ? 1 : chunks) : 0, full ? 3 * numbers : 3 * s.hidden}, wide);

  for (int64_t stop = s.steps; stop > 0; stop -= window) {
    const int64_t start = std::max<int64_t>(0, stop - window), count = stop - start;
    const bool add = stop < s.steps;
    if (again) {
      if (fast)
        launch_forward<N, true>(launch, a, s, start, count, in.out, cells, false,
                                gate_gradients.data, slots);
      else
        launch_forward<N, false>(launch, a, s, start, count, in.out, cells, false,
                                 gate_gradients.data, slots);
    }
    for (int64_t t = stop - 1; t >= start; --t)
      launch_step<N>(launch, a, in, s, t, cells, gates, gate_gradients, pointer<S>(dc));
    if (weights)
      launch_weight<N>(launch, s, sequence, read_gradients, start, count, walks, add,
                       pointer<S>(partial));
    if (peepholes)
      launch_peephole<N>(launch, s, read_gradients, cells, start, count, full, chunks, add,
                         pointer<S>(peephole_partial));
    if (needs[0])
      launch_gather<N>(launch, s, read_gradients, start, count, a.weight_ih, pointer<N>(dx),
                       s.steps);
  }

  if (dh.numel() > 0)
    launch_gather<N>(launch, s, read_gradients, 0, 1, a.weight_hh, pointer<N>(dh), 1);
  const int64_t ih_numbers = gate_numbers * s.channels * s.taps();
  const int64_t hh_numbers = gate_numbers * s.hidden * s.taps();
  if (needs[3]) reduce<N>(launch, partial, 0, dweight_ih);
  if (needs[4]) reduce<N>(launch, partial, ih_numbers, dweight_hh);
  if (dbias.numel() > 0) reduce<N>(launch, partial, ih_numbers + hh_numbers, dbias);
  if (peepholes) reduce<N>(launch, peephole_partial, 0, dpeephole);
  return {dx,         dh,         needs[2] && a.c.has_value() ? dc : make({0}, wide),
          dweight_ih, dweight_hh, dbias,
          dpeephole};
}

}  // namespace conv_lstm_cuda
}  // namespace vsod
