// What the host side (cpu.cpp) hands to the kernel of one SIMD level (cpu_kernel.cpp).
// N is the dtype of x, S that of the cell state (float64 for float64, else float32).
#pragma once

#include <stdint.h>

#include "../common/kernel.h"

namespace vsod {
namespace conv_lstm {

struct Frames {  // (B, T, channels, H, W) N; null if there is none
  const void* data;
  int64_t b, t, c, y, x;  // strides in elements
};

struct Sums {  // of all gates, (B, 4M, H, W) S without bias; null if there are none
  const void* data;
  int64_t batch;  // stride in elements
};

struct Problem {
  int64_t batch, steps, channels, hidden, height, width, kernel, dilation;
  Frames x;
  const void *h, *c;                   // (B, M, H, W) N and S; null: zeros
  const void *weight_ih, *weight_hh;   // (4M, C, k, k), (4M, M, k, k) N
  const void *bias, *peephole;         // (4M,), (3, M[, H, W]) N; null: none
  bool full_peephole;                  // one weight a pixel
  bool direct;                         // no Winograd: there are numbers that it cannot add
  void *out, *c_last, *cells, *gates;  // as in op.py; cells, gates null where not kept
  void* weights;                       // forward_weights() S
  int64_t* offsets;                    // kernel * kernel: of the taps in a packed plane

  // Backward only.  A null gradient is not needed.
  Frames grad_out;
  const void* grad_c;  // (B, M, H, W) S; null: zeros
  void* dc_of[2];      // (B, M, H, W) S: gradients of c_t, even and odd t; [0] ends as dc
  void* dh_of[2];      // the same of h_t, t > 0; a batch is dh_batch elements
  int64_t dh_batch[2];
  void *dx, *dh;                                      // N
  void *dweight_ih, *dweight_hh, *dbias, *dpeephole;  // S
  int64_t groups;          // shares of the tiles whose weight gradients are summed apart
  void* sums;              // groups * group_sums() S
  void* backward_weights;  // backward_weights() S

  // Only where the library convolves: of one step.  Frames of grad_out are then contiguous.
  Sums of_x, of_h;
  void* dgates;          // (B, 4M, H, W) S
  int64_t dgates_batch;  // stride in elements
};

struct Kernel {
  int64_t (*forward_weights)(const Problem&);   // elements
  int64_t (*backward_weights)(const Problem&);  // elements
  int64_t (*group_sums)(const Problem&);        // elements
  int64_t (*groups)(const Problem&);
  // Both return 0, or the bytes of scratch that there is no memory for.
  int64_t (*forward)(const Problem&, Parallel);
  int64_t (*backward)(const Problem&, Parallel);
  // Where library() says that the library convolves faster: gates from their sums, and dgates, of
  // one step, c and dc.
  bool (*library)(const Problem&);
  int64_t (*gates)(const Problem&, int64_t step, Parallel);
  int64_t (*gate_gradients)(const Problem&, int64_t step, Parallel);
  void (*activate)(const void* x, void* sigmoid, void* tanh, int64_t count);  // S; for tests
};

}  // namespace conv_lstm
}  // namespace vsod
