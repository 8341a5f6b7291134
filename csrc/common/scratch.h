// What the tasks of a CPU kernel share: rounding, how they are dealt out, scratch memory.  Like
// simd.h in the namespace of a SIMD level, and without the STL.
#pragma once

#include <stdlib.h>

#include "kernel.h"
#include "simd.h"

namespace vsod {
namespace VSOD_LEVEL {

VSOD_INLINE int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
VSOD_INLINE int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }
VSOD_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
VSOD_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

struct Counter {  // hands out 0, 1, 2, ... to threads
  int64_t next = 0;
  VSOD_INLINE int64_t take() { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); }
};

// One thread's scratch, cut into aligned pieces.  Without memory it only counts what they take.
class Scratch {
 public:
  explicit Scratch(char* base = nullptr) : base_(base) {}
  template <class T>
  VSOD_INLINE T* piece(int64_t count) {
    char* at = base_ ? base_ + used_ : nullptr;
    used_ += bytes<T>(count);
    return reinterpret_cast<T*>(at);
  }
  // What piece(count) takes: an odd number of cache lines, so that pieces of equal size do not all
  // start in the same L1 set.
  template <class T>
  static VSOD_INLINE int64_t bytes(int64_t count) {
    return round_up(count * int64_t(sizeof(T)), 128) + 64;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Kept between calls: fresh pages cost more than the small problems.  Null if there is no memory.
VSOD_INLINE char* thread_scratch(int64_t bytes) {
  struct Block {
    char* data = nullptr;
    int64_t size = 0;
    ~Block() { free(data); }
  };
  static thread_local Block block;
  if (block.size < bytes) {
    free(block.data);
    block.size = round_up(bytes, 4096);
    block.data = static_cast<char*>(aligned_alloc(4096, block.size));
    if (!block.data) block.size = 0;
  }
  return block.data;
}

// Runs task(i) for i = 0 .. count - 1, each once over all threads.
template <class Task>
void each_task(Parallel parallel, int64_t count, const Task& task) {
  struct Context {
    const Task& task;
    int64_t count;
    Counter counter;
  } context{task, count, {}};
  parallel(
      [](void* p) {
        Context& c = *static_cast<Context*>(p);
        for (int64_t i; (i = c.counter.take()) < c.count;) c.task(i);
      },
      &context);
}

// Runs task(i, places), where each thread has places of its own: Places(scratch, run) cuts them.
// A thread without memory leaves its tasks to the others.  Returns 0, or the bytes that a thread
// needs if no thread had them; then nothing has run.
template <class Places, class Run, class Task>
int64_t each_task(Parallel parallel, int64_t count, const Run& run, const Task& task) {
  struct Context {
    const Run& run;
    const Task& task;
    int64_t count, bytes;
    Counter counter;
    int64_t threads;  // that had memory
  } context{run, task, count, 0, {}, 0};
  Scratch sizes;
  Places(sizes, run);
  context.bytes = sizes.used();
  parallel(
      [](void* p) {
        Context& c = *static_cast<Context*>(p);
        char* memory = thread_scratch(c.bytes);
        if (!memory) return;
        __atomic_fetch_add(&c.threads, 1, __ATOMIC_RELAXED);
        Scratch scratch(memory);
        const Places at(scratch, c.run);
        for (int64_t i; (i = c.counter.take()) < c.count;) c.task(i, at);
      },
      &context);
  return context.threads ? 0 : context.bytes;
}

}  // namespace VSOD_LEVEL
}  // namespace vsod
