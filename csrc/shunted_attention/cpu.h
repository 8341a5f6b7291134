// What the host side (cpu.cpp) hands to the kernel of one SIMD level (cpu_kernel.cpp).
#pragma once

#include <stdint.h>

#include "../common/kernel.h"

namespace vsod {
namespace shunted_attention {

struct Strides {  // in elements, of a (batch, head, row, column) tensor
  int64_t b, h, n, d;
};

struct Operand {
  void* data;
  Strides strides;
};

// One head group: heads first_head .. first_head + heads - 1 of q see `length` keys.
struct Group {
  int64_t first_head, heads, length;
  Operand k, v;
  Operand dk, dv;  // backward only; data is null where no gradient is needed
  void* packed;    // forward only: packed_bytes(...) for the keys and values of the group
};

struct Problem {
  int64_t batch, heads, queries, head_dim;
  double scale;
  int64_t group_count;
  Group* groups;  // longest first: the heavy tasks start first
  Operand q, out;
  void* lse;             // (batch, heads, queries), contiguous, compute type
  Operand grad_out, dq;  // backward only; dq.data is null where no gradient is needed
  void* dq_sum;          // backward only: (batch, heads, padded queries, padded head_dim)
  void* row_terms;       // backward only: (2, batch, heads, queries): lse in base 2, delta
  int32_t* turns;        // backward only: (batch, heads, queries), zero: key blocks added to dq_sum
};

struct Kernel {
  int64_t (*packed_elements)(int64_t length, int64_t head_dim);   // of 4 (float64: 8) bytes, a head
  int64_t (*dq_sum_elements)(int64_t queries, int64_t head_dim);  // a head
  // Both return 0, or the bytes of scratch that there is no memory for.
  int64_t (*forward)(const Problem&, Parallel);
  int64_t (*backward)(const Problem&, Parallel);
};

}  // namespace shunted_attention
}  // namespace vsod
