// What the tasks of a CPU kernel share: rounding, a counter that deals out tasks, scratch memory.
// Like simd.h in the namespace of a SIMD level, and without the STL.
#pragma once

#include <stdlib.h>

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

// One thread's scratch, cut into aligned pieces.
class Scratch {
 public:
  explicit Scratch(char* base) : at_(base) {}
  template <class T>
  VSOD_INLINE T* piece(int64_t count) {
    T* p = reinterpret_cast<T*>(at_);
    at_ += bytes<T>(count);
    return p;
  }
  // What piece(count) takes: an odd number of cache lines, so that pieces of equal size do not all
  // start in the same L1 set.
  template <class T>
  static VSOD_INLINE int64_t bytes(int64_t count) {
    return round_up(count * int64_t(sizeof(T)), 128) + 64;
  }

 private:
  char* at_;
};

// Kept between calls: fresh pages cost more than the small problems.
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
    if (!block.data) abort();
  }
  return block.data;
}

}  // namespace VSOD_LEVEL
}  // namespace vsod
