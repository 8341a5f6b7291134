// conv_lstm around the convolution of the library (ATen), where that is faster than the kernel's.
//
// Forward: x of several steps is convolved at once, h of each step by itself; the gates are made of
// the two sums.  Backward: the gate gradients of each step, and out of them dh by one convolution;
// then dx, and the weight gradients, of several steps at once.  "Several" is a window, which bounds
// what is in memory beside the results.  Everything is computed in the compute type.
#pragma once

#include <array>
#include <tuple>

#include "../common/parallel.h"
#include "../common/tensors.h"
#include "cpu.h"

namespace vsod {
namespace conv_lstm {

constexpr int64_t kWindowBytes = 32 << 20;  // of the gate sums, or gradients, of a window

// A 'same' convolution with the bias left out.
struct Convolution {
  std::vector<int64_t> padding, dilation;
  const std::vector<int64_t> ones{1, 1}, zeros{0, 0};

  explicit Convolution(const Problem& p)
      : padding(2, p.dilation * (p.kernel / 2)), dilation(2, p.dilation) {}

  static Tensor contiguous(const Tensor& x) {
    return x.is_contiguous() ? x : torch::stable::contiguous(x);
  }

  Tensor forward(const Tensor& in, const Tensor& weight) const {
    using torch::stable::detail::from;
    std::array<StableIValue, 9> stack{from(in),    from(weight),  from(std::nullopt),
                                      from(ones),  from(padding), from(dilation),
                                      from(false), from(zeros),   from(int64_t(1))};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
    return contiguous(torch::stable::detail::to<Tensor>(stack[0]));
  }

  // Gradients of what is wanted: in, weight.
  std::array<MaybeTensor, 2> backward(const Tensor& grad, const Tensor& in, const Tensor& weight,
                                      std::array<bool, 2> wanted) const {
    using torch::stable::detail::from;
    const std::array<bool, 3> with_bias{wanted[0], wanted[1], false};
    const torch::headeronly::HeaderOnlyArrayRef<bool> mask(with_bias.data(), with_bias.size());
    std::array<StableIValue, 11> stack{
        from(grad),     from(in),    from(weight), from(std::nullopt), from(ones), from(padding),
        from(dilation), from(false), from(zeros),  from(int64_t(1)),   from(mask)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
    std::array<MaybeTensor, 2> found;
    for (size_t i = 0; i < 3; ++i) {  // to<> takes what is not wanted, too
      const Tensor gradient = torch::stable::detail::to<Tensor>(stack[i]);
      if (with_bias[i]) found[i] = contiguous(gradient);
    }
    return found;
  }
};

// What both directions share: steps in windows, tensors in the compute type.
class Library {
 public:
  Library(const char* op, const Kernel& kernel, const Problem& p, const Tensor& x,
          const MaybeTensor& h, const Tensor& weight_ih, const Tensor& weight_hh, const Tensor& out)
      : op_(op), kernel_(kernel), p_(p), type_(compute_type(x)), allocate_(op, x), convolution_(p),
        x_(x), out_(out), h_(h), weight_ih_(wide(weight_ih)), weight_hh_(wide(weight_hh)),
        image_(4 * p.hidden * p.height * p.width) {
    const int64_t fit = kWindowBytes / (p.batch * image_ * 4);
    window_ = fit < 1 ? 1 : fit < p.steps ? fit : p.steps;
  }

  void forward() {
    for (int64_t t = 0; t < p_.steps; ++t) {
      if (t % window_ == 0) convolve_x(t, t + window_ < p_.steps ? window_ : p_.steps - t);
      convolve_h(t);
      check_memory(op_, kernel_.gates(p_, t, on_each_thread));
    }
  }

  struct Wanted {
    bool dx, dh, weight_ih, weight_hh;
  };
  struct Gradients {  // dx and dh in x's dtype, the others in the compute type
    MaybeTensor dx, dh, weight_ih, weight_hh;
  };

  // The kernel writes those of c, bias and peepholes, where p has them.
  Gradients backward(const Wanted& wanted) {
    Gradients found;
    MaybeTensor dh[2];
    for (int64_t end = p_.steps; end > 0; end -= window_) {
      const int64_t first = end > window_ ? end - window_ : 0, count = end - first;
      const Tensor dgates =
          allocate_.empty({p_.batch, count, 4 * p_.hidden, p_.height, p_.width}, type_);
      p_.dgates_batch = count * image_;
      if (!p_.gates) convolve_x(first, count);
      for (int64_t t = end - 1; t >= first; --t) {
        p_.dgates = static_cast<float*>(dgates.data_ptr()) + (t - first) * image_;
        if (!p_.gates) convolve_h(t);
        check_memory(op_, kernel_.gate_gradients(p_, t, on_each_thread));
        if (t == 0 && !wanted.dh) continue;
        const Tensor step = torch::stable::select(dgates, 1, t - first);
        dh[t & 1] = convolution_.backward(step, before(t), weight_hh_, {true, false})[0];
        p_.dh_of[t & 1] = dh[t & 1]->data_ptr();
        p_.dh_batch[t & 1] = image_ / 4;
      }
      of_window(wanted, dgates, first, count, &found);
    }
    if (wanted.dh) found.dh = as(*dh[0], x_.scalar_type());
    return found;
  }

 private:
  static Tensor as(const Tensor& x, ScalarType type) {
    return x.scalar_type() == type ? x : torch::stable::to(x, type);
  }
  Tensor wide(const Tensor& x) const { return as(x, type_); }
  static Tensor steps_of(Tensor x, int64_t first, int64_t count) {
    return torch::stable::narrow(x, 1, first, count);
  }
  static Tensor as_images(const Tensor& x) { return torch::stable::flatten(x, 0, 1); }

  Tensor before(int64_t t) const {  // h_{t-1}, t from 0; there has to be a first h
    return wide(t > 0 ? torch::stable::select(out_, 1, t - 1) : *h_);
  }

  // The gate sums of x, steps `first` on.
  void convolve_x(int64_t first, int64_t count) {
    of_x_ = convolution_.forward(as_images(wide(steps_of(x_, first, count))), weight_ih_);
    p_.of_x.batch = count * image_;
    first_ = first;
  }
  // Of h, of step t, and where those of x are.
  void convolve_h(int64_t t) {
    p_.of_x.data = static_cast<const float*>(of_x_->data_ptr()) + (t - first_) * image_;
    p_.of_h = {nullptr, image_};
    if (t == 0 && !h_) return;
    of_h_ = convolution_.forward(before(t), weight_hh_);
    p_.of_h.data = of_h_->data_ptr();
  }

  // dx, and what the weight gradients get from a window.
  void of_window(const Wanted& wanted, const Tensor& dgates, int64_t first, int64_t count,
                 Gradients* found) {
    if (wanted.dx || wanted.weight_ih) {
      const Tensor frames = as_images(wide(steps_of(x_, first, count)));
      const auto gradients = convolution_.backward(as_images(dgates), frames, weight_ih_,
                                                   {wanted.dx, wanted.weight_ih});
      if (wanted.dx) {
        const Sizes sizes{p_.batch, count, p_.channels, p_.height, p_.width};
        const Tensor part = as(torch::stable::reshape(*gradients[0], sizes), x_.scalar_type());
        if (count == p_.steps) {
          found->dx = part;
        } else {
          if (!found->dx) found->dx = allocate_.empty(sizes_of(x_), x_.scalar_type());
          Tensor to = steps_of(*found->dx, first, count);
          torch::stable::copy_(to, part);
        }
      }
      add(&found->weight_ih, gradients[1]);
    }
    if (!wanted.weight_hh) return;
    // h of the step before: the first one is not in `out`.
    if (first == 0 && h_)
      add(&found->weight_hh, convolution_.backward(torch::stable::select(dgates, 1, 0), before(0),
                                                   weight_hh_, {false, true})[1]);
    const int64_t from = first > 0 ? first : 1;
    if (from < first + count)
      add(&found->weight_hh,
          convolution_.backward(as_images(steps_of(dgates, from - first, first + count - from)),
                                as_images(wide(steps_of(out_, from - 1, first + count - from))),
                                weight_hh_, {false, true})[1]);
  }

  static void add(MaybeTensor* sum, const MaybeTensor& term) {
    if (!term) return;
    if (!*sum) {
      *sum = term;
      return;
    }
    float* to = static_cast<float*>((*sum)->data_ptr());
    const float* from = static_cast<const float*>(term->data_ptr());
    for (int64_t i = 0; i < term->numel(); ++i) to[i] += from[i];
  }

  const char* op_;
  const Kernel& kernel_;
  Problem p_;
  const ScalarType type_;
  const Allocator allocate_;
  const Convolution convolution_;
  const Tensor &x_, &out_;
  const MaybeTensor& h_;
  const Tensor weight_ih_, weight_hh_;
  const int64_t image_;  // numbers of the gates of one image
  int64_t window_;       // steps
  int64_t first_ = 0;    // step in of_x_
  MaybeTensor of_x_, of_h_;
};

}  // namespace conv_lstm
}  // namespace vsod
