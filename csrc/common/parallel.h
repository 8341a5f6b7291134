// Threads of torch's own pool (its OpenMP and torch.set_num_threads are obeyed).
#pragma once

#include <torch/csrc/stable/ops.h>

namespace vsod {

// Runs body(context) once on each thread; in a nested parallel region, once in all.
inline void on_each_thread(void (*body)(void*), void* context) {
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { body(context); });
}

}  // namespace vsod
