// Shunted attention on a CPU, forward and backward, for one SIMD level.
//
// What.  For each head h of each group: out = softmax(scale * q k^T) v, and its gradients, with
// no score matrix in memory: scores live in one tile that stays in the L2 cache.
//
// How.  Everything is a product of register tiles: kTileRows x 2 vectors of accumulators, one
// broadcast operand A and two vectors of B for each step of the depth (tile_product).  The copies
// that the products read are made so that A is reached by fixed offsets and B by whole vectors:
//     A panel  [depth][kTileRows]        queries, one panel for kTileRows of them
//     B panel  [depth][kTileColumns]     keys, one panel for kTileColumns of them
//     rows     [depth][padded head_dim]  values (and, backward, q, k and dO) as they lie
// bfloat16 with vdpbf16ps runs the same code on pairs: an element is two neighbours along the
// depth in one 32-bit word, and one instruction does both (struct PairOp).
//
// Forward: a task is (head, kForwardQueries queries).  It walks the keys in blocks:
// S = q k^T with the row maximum taken from the accumulators, P = exp2(S - max) in place,
// O = O * correction + P v.  Keys and values are packed once per call, before.
//
// Backward: a task is (head, kBlockKeys keys).  It walks the queries in blocks and does all five
// products on one tile: S, dP = dO v^T, dV += P^T dO, dK += dS^T q, dQ += dS k.  dK and dV stay
// in the task's scratch; dQ is shared by the tasks of a head, and is added to in the order of
// the key blocks: a task waits for its turn at each query block (a wavefront, since tasks start
// in that order).  So there are no copies of dQ, and the bits do not depend on the threads.

#include "cpu.h"

#include <sched.h>
#include <stdlib.h>

#include "../common/scratch.h"
#include "../common/simd.h"

namespace vsod {
namespace VSOD_LEVEL {

using namespace shunted_attention;

namespace {

constexpr int kForwardQueries = 8 * kTileRows;
constexpr int kForwardKeys = 256;
constexpr int kBackwardQueries = 8 * kTileRows;
constexpr int kPad = 16;  // breaks the power-of-two stride of score tiles

// ------------------------------------------------------------------ arithmetic of one element

// Elements are plain numbers.
template <class T>
struct PlainOp {
  using Number = T;   // accumulators, scores, softmax
  using Element = T;  // what the products read
  static constexpr int kDepthStep = 1;  // numbers along the depth in one element
  static constexpr int kExpDegree = 5;
  static VSOD_INLINE Vec<T> multiply_add(Vec<T> sum, Vec<T> a, Vec<T> b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
// Elements are two bfloat16 in one word.
struct PairOp {
  using Number = float;
  using Element = uint32_t;
  static constexpr int kDepthStep = 2;
  static constexpr int kExpDegree = 4;
  static VSOD_INLINE Vec<float> multiply_add(Vec<float> sum, Vec<uint32_t> a, Vec<uint32_t> b) {
    return Vec<float>(_mm512_dpbf16_ps(__m512(sum), __m512bh(a), __m512bh(b)));
  }
};
#endif

constexpr int kTileColumnVectors = 2;
template <class Op>
constexpr int kTileColumns = kTileColumnVectors* kLanes<typename Op::Number>;
// Keys of one backward task, about 224: whole register tiles as rows (dK, dV) and columns (S, dP).
template <class Op>
constexpr int kBlockKeys = 448 / (kTileRows * kTileColumns<Op>) * (kTileRows * kTileColumns<Op> / 2);

// ------------------------------------------------------------------ register tile

// sum[i][0..1] = A[i, :] @ B for kTileRows rows and one pair of vectors of columns:
// A[i, k] = a[i * kRowStep + k * kDepthStep], B[k, :] = b[k * b_stride ...].
// Then finish(i, sum[i][0], sum[i][1]) for each row.
template <class Op, int kRowStep, int kStep, class Finish>
VSOD_INLINE void tile_product(const typename Op::Element* a, const typename Op::Element* b,
                              int64_t b_stride, int64_t depth, Finish finish) {
  using Number = typename Op::Number;
  using Element = typename Op::Element;
  constexpr int kN = kLanes<Number>;
  Vec<Number> sum[kTileRows][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Vec<Element> b0 = load(b), b1 = load(b + kN);
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      const Vec<Element> x = broadcast(a[i * kRowStep]);
      sum[i][0] = Op::multiply_add(sum[i][0], x, b0);
      sum[i][1] = Op::multiply_add(sum[i][1], x, b1);
    }
    a += kStep;
    b += b_stride;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) finish(i, sum[i][0], sum[i][1]);
}

// C[rows, columns] (+)= A @ B over whole register tiles.  scale_row: C is multiplied by
// row_scale[i] first; kFirst: C is not read.
template <class Op, int kRowStep, int kStep, bool kFirst, bool kScaleRows>
VSOD_INLINE void accumulate(const typename Op::Element* a, int64_t a_panel_stride, int64_t rows,
                            const typename Op::Element* b, int64_t b_stride, int64_t columns,
                            int64_t depth, typename Op::Number* c, int64_t c_stride,
                            const typename Op::Number* row_scale) {
  using Number = typename Op::Number;
  constexpr int kN = kLanes<Number>;
  for (int64_t i0 = 0; i0 < rows; i0 += kTileRows) {
    const auto* a_panel = a + i0 / kTileRows * a_panel_stride;
    for (int64_t j = 0; j < columns; j += kTileColumns<Op>) {
      Number* c_tile = c + i0 * c_stride + j;
      tile_product<Op, kRowStep, kStep>(
          a_panel, b + j, b_stride, depth,
          [&](int i, Vec<Number> s0, Vec<Number> s1) __attribute__((always_inline)) {
            Number* row = c_tile + i * c_stride;
            if constexpr (!kFirst && kScaleRows) {
              const Vec<Number> x = broadcast(row_scale[i0 + i]);
              s0 += load(row) * x;
              s1 += load(row + kN) * x;
            } else if constexpr (!kFirst) {
              s0 += load(row);
              s1 += load(row + kN);
            }
            store(row, s0);
            store(row + kN, s1);
          });
    }
  }
}

// ------------------------------------------------------------------ copies in and out

template <class Storage>
struct Rows {  // a (rows, head_dim) matrix of one head
  const Storage* data;
  int64_t row_stride, column_stride;
};

template <class Storage>
VSOD_INLINE Storage* head_data(const Operand& x, int64_t b, int64_t h) {
  return static_cast<Storage*>(x.data) + b * x.strides.b + h * x.strides.h;
}
template <class Storage>
VSOD_INLINE Rows<Storage> head_rows(const Operand& x, int64_t b, int64_t h, int64_t first_row) {
  return {head_data<Storage>(x, b, h) + first_row * x.strides.n, x.strides.n, x.strides.d};
}

// One row as elements along its depth, zero to the end of `padded` numbers.
template <class Op, class Storage>
VSOD_INLINE void read_row(const Storage* src, int64_t column_stride, int64_t count, int64_t padded,
                          bool negate, typename Op::Element* dst) {
  if constexpr (Op::kDepthStep == 2) {
    uint16_t* words = reinterpret_cast<uint16_t*>(dst);
    const uint16_t sign = negate ? 0x8000 : 0;
    if (column_stride == 1) {
      for (int64_t d = 0; d < count; ++d) words[d] = src[d].bits ^ sign;
    } else {
      for (int64_t d = 0; d < count; ++d) words[d] = src[d * column_stride].bits ^ sign;
    }
    for (int64_t d = count; d < padded; ++d) words[d] = 0;
  } else {
    const typename Op::Number sign = negate ? -1 : 1;
    if (column_stride == 1) {
      for (int64_t d = 0; d < count; ++d) dst[d] = widen(src[d]) * sign;
    } else {
      for (int64_t d = 0; d < count; ++d) dst[d] = widen(src[d * column_stride]) * sign;
    }
    for (int64_t d = count; d < padded; ++d) dst[d] = 0;
  }
}

// Rows as elements along their depth, [padded_rows][stride]; rows past `rows` are zero.
template <class Op, class Storage>
VSOD_INLINE void read_rows(Rows<Storage> src, int64_t rows, int64_t padded_rows, int64_t head_dim,
                           int64_t padded_dim, bool negate, typename Op::Element* dst,
                           int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    read_row<Op>(src.data + r * src.row_stride, src.column_stride, head_dim, padded_dim, negate,
                 dst + r * stride);
  for (int64_t r = rows; r < padded_rows; ++r) memset(dst + r * stride, 0, stride * sizeof(*dst));
}

// dst[k][j] = src[j][k]: kWidth rows become one panel of `depth` steps.  Rows lie `stride` apart,
// which is room for whole vectors; dst has room for one vector past its end.
template <int kWidth, class Element>
VSOD_INLINE void transpose_panel(const Element* src, int64_t stride, int64_t depth, Element* dst) {
  constexpr int kN = kLanes<Element>;
  for (int j = (kWidth - 1) / kN * kN; j >= 0; j -= kN)
    for (int64_t k = 0; k < depth; k += kN) {
      Vec<Element> square[kN] = {};
#pragma GCC unroll 16
      for (int r = 0; r < kN; ++r)
        if (j + r < kWidth) square[r] = load(src + (j + r) * stride + k);
      transpose_square<Element>(square);
      // The last vector of a step may run into the first of the next, which is written after it.
      const int steps = int(smaller(kN, depth - k));
      if (steps == kN) {
#pragma GCC unroll 16
        for (int r = 0; r < kN; ++r) store(dst + (k + r) * kWidth + j, square[r]);
      } else {
        for (int r = 0; r < steps; ++r) store(dst + (k + r) * kWidth + j, square[r]);
      }
    }
}

// Rows made for use as the depth: [ceil(rows / kDepthStep)][padded_dim].  In: rows of elements
// along the head_dim (read_rows); pairs are taken apart and joined across two rows.
template <class Op>
VSOD_INLINE void rows_to_depth(const typename Op::Element* src, int64_t stride, int64_t rows,
                               int64_t padded_dim, typename Op::Element* dst) {
  if constexpr (Op::kDepthStep == 2) {
    for (int64_t r = 0; r < rows; r += 2) {
      const uint16_t* low = reinterpret_cast<const uint16_t*>(src + r * stride);
      const uint16_t* high = reinterpret_cast<const uint16_t*>(src + (r + 1) * stride);
      typename Op::Element* to = dst + r / 2 * padded_dim;
      for (int64_t d = 0; d < padded_dim; ++d) to[d] = low[d] | uint32_t(high[d]) << 16;
    }
  } else {
    for (int64_t r = 0; r < rows; ++r)
      memcpy(dst + r * padded_dim, src + r * stride, padded_dim * sizeof(*dst));
  }
}

template <class Storage, class Number>
VSOD_INLINE void write_row(const Number* src, Number factor, int64_t count, Storage* dst,
                           int64_t column_stride) {
  if (column_stride == 1) {
    for (int64_t d = 0; d < count; ++d) dst[d] = Narrow<Storage>::from(src[d] * factor);
  } else {
    for (int64_t d = 0; d < count; ++d)
      dst[d * column_stride] = Narrow<Storage>::from(src[d] * factor);
  }
}

// ------------------------------------------------------------------ tasks and scratch

struct Task {
  const Group* group;
  int64_t b, h, block;  // h within the group
};

// Task `index` of those of all groups, in the order of the groups, `blocks(group)` a head.
template <class Blocks>
VSOD_INLINE bool find_task(const Problem& p, int64_t index, Blocks blocks, Task* task) {
  for (int64_t g = 0; g < p.group_count; ++g) {
    const Group& group = p.groups[g];
    const int64_t per_head = blocks(group), count = p.batch * group.heads * per_head;
    if (index < count) {
      const int64_t head = index / per_head;
      *task = {&group, head / group.heads, head % group.heads, index % per_head};
      return true;
    }
    index -= count;
  }
  return false;
}

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

// ------------------------------------------------------------------ forward

template <class Op>
struct ForwardLayout {
  using Element = typename Op::Element;
  int64_t depth;       // elements along head_dim
  int64_t padded_dim;  // numbers, whole register tiles
  explicit ForwardLayout(int64_t head_dim)
      : depth(ceil_div(head_dim, Op::kDepthStep)), padded_dim(round_up(head_dim, kTileColumns<Op>)) {}
  // A head's packed copy: key panels, then value rows.
  int64_t key_elements(int64_t length) const {
    return round_up(length, kTileColumns<Op>) * depth;
  }
  int64_t value_elements(int64_t length) const {
    return ceil_div(length, Op::kDepthStep) * padded_dim;
  }
};

template <class Op>
int64_t packed_elements(int64_t length, int64_t head_dim) {
  const ForwardLayout<Op> layout(head_dim);
  return layout.key_elements(length) + layout.value_elements(length);
}

template <class Op, class Storage>
struct Forward {
  using Number = typename Op::Number;
  using Element = typename Op::Element;
  static constexpr int kN = kLanes<Number>;
  static constexpr int kColumns = kTileColumns<Op>;
  static constexpr int kScoreStride = kForwardKeys + kPad;
  static constexpr int kProbStride = kForwardKeys / Op::kDepthStep + kPad;

  const Problem& p;
  ForwardLayout<Op> layout;
  Number factor;  // |scale| in base 2
  bool negate;    // q is negated where scale is negative, so that the maximum is one of S
  Counter pack_tasks, tasks;

  explicit Forward(const Problem& problem)
      : p(problem), layout(problem.head_dim), factor(fabs(problem.scale) * kLog2e),
        negate(problem.scale < 0) {}

  Element* packed_head(const Group& group, int64_t b, int64_t h) const {
    return static_cast<Element*>(group.packed) +
           (b * group.heads + h) * packed_elements<Op>(group.length, p.head_dim);
  }

  static int64_t key_blocks(const Group& group) { return ceil_div(group.length, kForwardKeys); }

  // Packs kForwardKeys keys and values of one head.
  void pack(const Task& task) {
    const Group& group = *task.group;
    const int64_t first = task.block * kForwardKeys;
    const int64_t keys = smaller(kForwardKeys, group.length - first);
    const int64_t stride = layout.padded_dim;  // rows are staged with room for whole tiles
    Scratch scratch(thread_scratch(round_up(kForwardKeys * stride * sizeof(Element), 64)));
    Element* staged = scratch.piece<Element>(kForwardKeys * stride);
    Element* head = packed_head(group, task.b, task.h);

    read_rows<Op>(head_rows<Storage>(group.k, task.b, task.h, first), keys,
                  round_up(keys, kColumns), p.head_dim, layout.depth * Op::kDepthStep, false,
                  staged, stride);
    for (int64_t j = 0; j < keys; j += kColumns)
      transpose_panel<kColumns>(staged + j * stride, stride, layout.depth,
                                head + (first + j) * layout.depth);

    read_rows<Op>(head_rows<Storage>(group.v, task.b, task.h, first), keys,
                  round_up(keys, Op::kDepthStep), p.head_dim, layout.padded_dim, false, staged,
                  stride);
    rows_to_depth<Op>(staged, stride, keys, layout.padded_dim,
                      head + layout.key_elements(group.length) +
                          first / Op::kDepthStep * layout.padded_dim);
  }

  // P = exp2(factor * (S - max)) of one row, in place, as pairs in `pairs`.  Returns its sum.
  VSOD_INLINE Number row_softmax(Number* scores, int64_t keys, Number max, void* pairs) {
    const Vec<Number> shift = broadcast(max * factor);
    const Vec<Number> scale = broadcast(factor);
    Vec<Number> sum = {};
    for (int64_t j = 0; j < keys; j += kColumns) {
      Vec<Number> x0 = exp2_nonpositive<Op::kExpDegree>(load(scores + j) * scale - shift);
      Vec<Number> x1 = exp2_nonpositive<Op::kExpDegree>(load(scores + j + kN) * scale - shift);
      if (__builtin_expect(j + kColumns > keys, 0)) {
        x0 = keep_first(x0, int(keys - j), Number(0));
        x1 = keep_first(x1, int(keys - j) - kN, Number(0));
      }
      sum += x0 + x1;
      store_probs(scores + j, static_cast<Element*>(pairs) + j / 2, x0, x1);
    }
    return horizontal_sum<Number>(sum);
  }
  static VSOD_INLINE void store_probs(Number* at, Number*, Vec<Number> x0, Vec<Number> x1) {
    store(at, x0);
    store(at + kN, x1);
  }
#if defined(__AVX512BF16__)
  static VSOD_INLINE void store_probs(float*, uint32_t* pairs, Vec<float> x0, Vec<float> x1) {
    store(pairs, Vec<uint32_t>(_mm512_cvtne2ps_pbh(__m512(x1), __m512(x0))));
  }
#endif

  void run(const Task& task) {
    const Group& group = *task.group;
    const int64_t first = task.block * kForwardQueries;
    const int64_t queries = smaller(kForwardQueries, p.queries - first);
    const int64_t rows = round_up(queries, kTileRows);
    const int64_t head = group.first_head + task.h;
    const int64_t stride = layout.padded_dim;

    char* base = thread_scratch(
        kForwardQueries * (layout.depth + stride) * sizeof(Element) +
        kForwardQueries * (kScoreStride + kProbStride + stride + kN + 3) * sizeof(Number) + 4096);
    Scratch scratch(base);
    Element* q_panels = scratch.piece<Element>(kForwardQueries * layout.depth + kN);
    Element* staged = scratch.piece<Element>(kForwardQueries * stride);
    Number* scores = scratch.piece<Number>(kForwardQueries * kScoreStride);
    Element* probs = Op::kDepthStep == 1 ? reinterpret_cast<Element*>(scores)
                                         : scratch.piece<Element>(kForwardQueries * kProbStride);
    constexpr int kProbRow = Op::kDepthStep == 1 ? kScoreStride : kProbStride;
    Number* sums_out = scratch.piece<Number>(kForwardQueries * stride);
    Number* block_max = scratch.piece<Number>(kForwardQueries * kN);
    Number* row_max = scratch.piece<Number>(kForwardQueries);
    Number* row_sum = scratch.piece<Number>(kForwardQueries);
    Number* correction = scratch.piece<Number>(kForwardQueries);

    read_rows<Op>(head_rows<Storage>(p.q, task.b, head, first), queries, rows, p.head_dim,
                  layout.depth * Op::kDepthStep, negate, staged, stride);
    for (int64_t i = 0; i < rows; i += kTileRows)
      transpose_panel<kTileRows>(staged + i * stride, stride, layout.depth,
                                 q_panels + i * layout.depth);
    const Number lowest = -Number(INFINITY);
    for (int64_t i = 0; i < rows; ++i) row_max[i] = lowest, row_sum[i] = 0;

    const Element* packed_keys = packed_head(group, task.b, task.h);
    const Element* packed_values = packed_keys + layout.key_elements(group.length);
    for (int64_t key = 0; key < group.length; key += kForwardKeys) {
      const int64_t keys = smaller(kForwardKeys, group.length - key);

      // S [rows, keys] = q k^T, and its maximum, lane by lane.
      for (int64_t j = 0; j < keys; j += kColumns) {
        const Element* k_panel = packed_keys + (key + j) * layout.depth;
        const int valid = int(smaller(kColumns, keys - j));
        for (int64_t i0 = 0; i0 < rows; i0 += kTileRows)
          tile_product<Op, 1, kTileRows>(
              q_panels + i0 * layout.depth, k_panel, kColumns, layout.depth,
              [&](int i, Vec<Number> s0, Vec<Number> s1) __attribute__((always_inline)) {
                Number* row = scores + (i0 + i) * kScoreStride + j;
                Number* max = block_max + (i0 + i) * kN;
                store(row, s0);
                store(row + kN, s1);
                if (__builtin_expect(valid < kColumns, 0)) {
                  s0 = keep_first(s0, valid, lowest);
                  s1 = keep_first(s1, valid - kN, lowest);
                }
                const Vec<Number> best = maximum<Number>(s0, s1);
                store(max, j == 0 ? best : maximum<Number>(best, load(max)));
              });
      }

      for (int64_t i = 0; i < queries; ++i) {
        const Number best = horizontal_max<Number>(load(block_max + i * kN));
        const Number max = best > row_max[i] ? best : row_max[i];
        // A row that has seen only -inf so far: 0 in its place gives P = 0, not NaN.
        const Number finite = max == lowest ? 0 : max;
        correction[i] = row_max[i] == lowest ? 0
                        : row_max[i] == max  ? 1
                                             : exp2((row_max[i] - max) * factor);
        row_max[i] = max;
        const Number sum = row_softmax(scores + i * kScoreStride, keys, finite,
                                       probs + i * kProbRow);
        row_sum[i] = row_sum[i] * correction[i] + sum;
      }
      for (int64_t i = queries; i < rows; ++i) correction[i] = 0;

      // O [rows, head_dim] = O * correction + P v
      const Element* v = packed_values + key / Op::kDepthStep * stride;
      const int64_t depth = ceil_div(keys, Op::kDepthStep);
      if (key == 0)
        accumulate<Op, kProbRow, 1, true, true>(probs, kTileRows * kProbRow, rows, v, stride,
                                                stride, depth, sums_out, stride, correction);
      else
        accumulate<Op, kProbRow, 1, false, true>(probs, kTileRows * kProbRow, rows, v, stride,
                                                 stride, depth, sums_out, stride, correction);
    }

    Storage* out = head_data<Storage>(p.out, task.b, head) + first * p.out.strides.n;
    Number* lse = static_cast<Number*>(p.lse) + (task.b * p.heads + head) * p.queries + first;
    for (int64_t i = 0; i < queries; ++i) {
      write_row<Storage, Number>(sums_out + i * stride, 1 / row_sum[i], p.head_dim,
                                 out + i * p.out.strides.n, p.out.strides.d);
      const Number log2_sum = row_max[i] == Number(INFINITY) ? 0 : log2(row_sum[i]);
      lse[i] = (row_max[i] * factor + log2_sum) * Number(kLn2);
    }
  }
};

template <class Op, class Storage>
void forward(const Problem& p, Parallel parallel) {
  using Run = Forward<Op, Storage>;
  Run state(p);
  parallel(
      [](void* context) {
        Run& run = *static_cast<Run*>(context);
        Task task;
        while (find_task(run.p, run.pack_tasks.take(), Run::key_blocks, &task)) run.pack(task);
      },
      &state);
  parallel(
      [](void* context) {
        Run& run = *static_cast<Run*>(context);
        const int64_t blocks = ceil_div(run.p.queries, kForwardQueries);
        Task task;
        while (find_task(run.p, run.tasks.take(), [&](const Group&) { return blocks; }, &task))
          run.run(task);
      },
      &state);
}

// ------------------------------------------------------------------ backward

template <class Op>
int64_t dq_sum_elements(int64_t queries, int64_t head_dim) {
  return round_up(queries, kTileRows) * round_up(head_dim, kTileColumns<Op>);
}

template <class Op, class Storage>
struct Backward {
  using Number = typename Op::Number;
  using Element = typename Op::Element;
  static constexpr int kN = kLanes<Number>;
  static constexpr int kColumns = kTileColumns<Op>;
  static constexpr int kKeys = kBlockKeys<Op>;
  static constexpr int kQueries = kBackwardQueries;
  static constexpr int kStride = kKeys + kPad;  // of score tiles, in numbers or q pairs
  static constexpr int kPairStride = kKeys / Op::kDepthStep + kPad;  // of key pairs
  static_assert(kKeys % kTileRows == 0 && kKeys % kColumns == 0 && kKeys > 0);

  const Problem& p;
  int64_t depth, padded_dim, query_blocks;
  Number factor;  // scale in base 2
  Counter term_tasks, tasks;

  explicit Backward(const Problem& problem)
      : p(problem), depth(ceil_div(problem.head_dim, Op::kDepthStep)),
        padded_dim(round_up(problem.head_dim, kTileColumns<Op>)),
        query_blocks(ceil_div(problem.queries, kQueries)), factor(problem.scale * kLog2e) {}

  static int64_t key_blocks(const Group& group) { return ceil_div(group.length, kKeys); }

  Number* row_term(int which, int64_t b, int64_t head) const {
    return static_cast<Number*>(p.row_terms) + ((which * p.batch + b) * p.heads + head) * p.queries;
  }

  // lse in base 2, and delta = sum(dO * out), of one block of rows.
  void terms(int64_t b, int64_t head, int64_t block) {
    const int64_t first = block * kQueries, end = smaller(first + kQueries, p.queries);
    const Number* lse = static_cast<const Number*>(p.lse) + (b * p.heads + head) * p.queries;
    const Rows<Storage> grad = head_rows<Storage>(p.grad_out, b, head, 0);
    const Rows<Storage> out = head_rows<Storage>(p.out, b, head, 0);
    for (int64_t i = first; i < end; ++i) {
      row_term(0, b, head)[i] = lse[i] * Number(kLog2e);
      const Storage* x = grad.data + i * grad.row_stride;
      const Storage* y = out.data + i * out.row_stride;
      Number sum[kN] = {};
      int64_t d = 0;
      if (grad.column_stride == 1 && out.column_stride == 1)
        for (; d + kN <= p.head_dim; d += kN)
          for (int l = 0; l < kN; ++l) sum[l] += widen(x[d + l]) * widen(y[d + l]);
      for (; d < p.head_dim; ++d)
        sum[0] += widen(x[d * grad.column_stride]) * widen(y[d * out.column_stride]);
      row_term(1, b, head)[i] = horizontal_sum<Number>(load(sum));
    }
  }

  // P and dS as the operands of the last three products.  Plain numbers are used as they are;
  // pairs are joined along the queries (for dV and dK) and along the keys (for dQ).
#if defined(__AVX512BF16__)
  static void pair_up(const Number* scores, int64_t queries, int64_t keys, uint32_t* along_queries,
                      uint32_t* along_keys) {
    __m512i interleave;
    uint16_t lanes[32];
    for (int i = 0; i < 32; ++i) lanes[i] = uint16_t(i / 2 + 16 * (i % 2));
    memcpy(&interleave, lanes, 64);
    for (int64_t i = 0; i < queries; i += 2) {
      const Number* row = scores + i * kStride;
      const bool single = i + 1 == queries;
      for (int64_t j = 0; j < keys; j += kN) {
        const __m512 low = __m512(load(row + j));
        const __m512 high = single ? __m512{} : __m512(load(row + kStride + j));
        const __m512i both = __m512i(_mm512_cvtne2ps_pbh(high, low));
        store(along_queries + i / 2 * kStride + j,
              Vec<uint32_t>(_mm512_permutexvar_epi16(interleave, both)));
      }
      if (!along_keys) continue;
      for (int64_t r = i; r < smaller(i + 2, queries); ++r)
        for (int64_t j = 0; j < keys; j += 2 * kN)
          store(along_keys + r * kPairStride + j / 2,
                Vec<uint32_t>(_mm512_cvtne2ps_pbh(__m512(load(scores + r * kStride + j + kN)),
                                                  __m512(load(scores + r * kStride + j)))));
    }
  }
#endif

  void run(const Task& task) {
    const Group& group = *task.group;
    const bool need_dv = group.dv.data, need_dk = group.dk.data, need_dq = p.dq.data;
    if (!need_dv && !need_dk && !need_dq) return;
    const bool need_ds = need_dk || need_dq;
    const int64_t first_key = task.block * kKeys;
    const int64_t keys = smaller(kKeys, group.length - first_key);
    const int64_t key_columns = round_up(keys, kColumns), key_rows = round_up(keys, kTileRows);
    const int64_t key_depth = ceil_div(keys, Op::kDepthStep);
    const int64_t head = group.first_head + task.h, stride = padded_dim;
    // The softmax of a single key is constant: dQ and dK are zero, not the noise of dP - delta.
    const Number scale = group.length == 1 ? 0 : Number(p.scale);
    constexpr bool kPairs = Op::kDepthStep == 2;

    const int64_t staged_rows = kKeys > kQueries ? kKeys : kQueries;
    char* base = thread_scratch(
        (staged_rows * stride + 2 * kKeys * depth + kKeys * stride + 2 * kQueries * depth +
         2 * kQueries * stride + (kPairs ? 2 * kQueries * kStride : 0)) *
            sizeof(Element) +
        (2 * kKeys * stride + 2 * kQueries * kStride + 2 * kQueries) * sizeof(Number) + 4096);
    Scratch scratch(base);
    Element* staged = scratch.piece<Element>(staged_rows * stride);
    Element* k_panels = scratch.piece<Element>(kKeys * depth);
    Element* v_panels = scratch.piece<Element>(kKeys * depth);
    Element* k_rows = scratch.piece<Element>(kKeys / Op::kDepthStep * stride);
    Element* q_panels = scratch.piece<Element>(kQueries * depth + kN);
    Element* do_panels = scratch.piece<Element>(kQueries * depth + kN);
    Element* q_rows = scratch.piece<Element>(kQueries / Op::kDepthStep * stride);
    Element* do_rows = scratch.piece<Element>(kQueries / Op::kDepthStep * stride);
    Number* dk_sum = scratch.piece<Number>(kKeys * stride);
    Number* dv_sum = scratch.piece<Number>(kKeys * stride);
    Number* probs = scratch.piece<Number>(kQueries * kStride);
    Number* dscores = scratch.piece<Number>(kQueries * kStride);
    Number* lse2 = scratch.piece<Number>(kQueries);
    Number* delta = scratch.piece<Number>(kQueries);
    Element *probs_by_query, *ds_by_query, *ds_by_key;
    if constexpr (kPairs) {
      probs_by_query = scratch.piece<Element>(kQueries / 2 * kStride);
      ds_by_query = scratch.piece<Element>(kQueries / 2 * kStride);
      ds_by_key = scratch.piece<Element>(kQueries * kPairStride);
    } else {
      probs_by_query = probs;
      ds_by_query = ds_by_key = dscores;
    }
    constexpr int kKeyRow = kPairs ? kPairStride : kStride;

    read_rows<Op>(head_rows<Storage>(group.k, task.b, task.h, first_key), keys, key_columns,
                  p.head_dim, stride, false, staged, stride);
    for (int64_t j = 0; j < keys; j += kColumns)
      transpose_panel<kColumns>(staged + j * stride, stride, depth, k_panels + j * depth);
    if (need_dq) rows_to_depth<Op>(staged, stride, keys, stride, k_rows);
    if (need_ds) {
      read_rows<Op>(head_rows<Storage>(group.v, task.b, task.h, first_key), keys, key_columns,
                    p.head_dim, stride, false, staged, stride);
      for (int64_t j = 0; j < keys; j += kColumns)
        transpose_panel<kColumns>(staged + j * stride, stride, depth, v_panels + j * depth);
    }

    for (int64_t block = 0; block < query_blocks; ++block) {
      const int64_t first = block * kQueries;
      const int64_t queries = smaller(kQueries, p.queries - first);
      const int64_t rows = round_up(queries, kTileRows);
      const int64_t query_depth = ceil_div(queries, Op::kDepthStep);
      const int64_t padded_rows = round_up(rows, 2);
      for (int64_t i = 0; i < rows; ++i) {
        lse2[i] = i < queries ? row_term(0, task.b, head)[first + i] : Number(INFINITY);
        delta[i] = i < queries ? row_term(1, task.b, head)[first + i] : Number(0);
      }
      read_rows<Op>(head_rows<Storage>(p.q, task.b, head, first), queries, padded_rows, p.head_dim,
                    stride, false, staged, stride);
      for (int64_t i = 0; i < rows; i += kTileRows)
        transpose_panel<kTileRows>(staged + i * stride, stride, depth, q_panels + i * depth);
      if (need_dk) rows_to_depth<Op>(staged, stride, queries, stride, q_rows);
      read_rows<Op>(head_rows<Storage>(p.grad_out, task.b, head, first), queries, padded_rows,
                    p.head_dim, stride, false, staged, stride);
      if (need_ds)
        for (int64_t i = 0; i < rows; i += kTileRows)
          transpose_panel<kTileRows>(staged + i * stride, stride, depth, do_panels + i * depth);
      if (need_dv) rows_to_depth<Op>(staged, stride, queries, stride, do_rows);

      // P [rows, keys] = exp2(factor * q k^T - lse),  dS [rows, keys] = P * (dO v^T - delta)
      for (int64_t j = 0; j < keys; j += kColumns)
        for (int64_t i0 = 0; i0 < rows; i0 += kTileRows)
          tile_product<Op, 1, kTileRows>(
              q_panels + i0 * depth, k_panels + j * depth, kColumns, depth,
              [&](int i, Vec<Number> s0, Vec<Number> s1) __attribute__((always_inline)) {
                Number* row = probs + (i0 + i) * kStride + j;
                const Vec<Number> shift = broadcast(lse2[i0 + i]);
                store(row, exp2_nonpositive<Op::kExpDegree>(s0 * factor - shift));
                store(row + kN, exp2_nonpositive<Op::kExpDegree>(s1 * factor - shift));
              });
      if (need_ds)
        for (int64_t j = 0; j < keys; j += kColumns) {
          const int valid = int(smaller(kColumns, keys - j));
          for (int64_t i0 = 0; i0 < rows; i0 += kTileRows)
            tile_product<Op, 1, kTileRows>(
                do_panels + i0 * depth, v_panels + j * depth, kColumns, depth,
                [&](int i, Vec<Number> s0, Vec<Number> s1) __attribute__((always_inline)) {
                  const int64_t at = (i0 + i) * kStride + j;
                  const Vec<Number> shift = broadcast(delta[i0 + i]);
                  s0 = load(probs + at) * (s0 - shift);
                  s1 = load(probs + at + kN) * (s1 - shift);
                  if (__builtin_expect(valid < kColumns, 0)) {
                    s0 = keep_first(s0, valid, Number(0));
                    s1 = keep_first(s1, valid - kN, Number(0));
                  }
                  store(dscores + at, s0);
                  store(dscores + at + kN, s1);
                });
        }
#if defined(__AVX512BF16__)
      if constexpr (kPairs) {
        if (need_dv) pair_up(probs, queries, key_columns, probs_by_query, nullptr);
        if (need_ds) pair_up(dscores, queries, key_columns, ds_by_query, ds_by_key);
      }
#endif

      // dV [keys, head_dim] += P^T dO,  dK [keys, head_dim] += dS^T q
      if (need_dv) add_product<1, kStride>(block == 0, probs_by_query, kTileRows, key_rows, do_rows,
                                           query_depth, dv_sum);
      if (need_dk) add_product<1, kStride>(block == 0, ds_by_query, kTileRows, key_rows, q_rows,
                                           query_depth, dk_sum);
      // dQ [rows, head_dim] += dS k, when the key blocks before this one have been added
      if (need_dq) {
        Number* dq_sum = static_cast<Number*>(p.dq_sum) +
                         (task.b * p.heads + head) * dq_sum_elements<Op>(p.queries, p.head_dim) +
                         first * stride;
        int32_t* turn = p.turns + (task.b * p.heads + head) * query_blocks + block;
        wait_for(turn, int32_t(task.block));
        add_product<kKeyRow, 1>(task.block == 0, ds_by_key, kTileRows * kKeyRow, rows, k_rows,
                                key_depth, dq_sum);
        __atomic_store_n(turn, int32_t(task.block) + 1, __ATOMIC_RELEASE);
        if (task.block + 1 == key_blocks(group)) {
          Storage* dq = head_data<Storage>(p.dq, task.b, head) + first * p.dq.strides.n;
          for (int64_t i = 0; i < queries; ++i)
            write_row<Storage, Number>(dq_sum + i * stride, scale, p.head_dim,
                                       dq + i * p.dq.strides.n, p.dq.strides.d);
        }
      }
    }

    write_head_rows(need_dk, group.dk, task, first_key, keys, dk_sum, scale);
    write_head_rows(need_dv, group.dv, task, first_key, keys, dv_sum, Number(1));
  }

  template <int kRowStep, int kStep>
  VSOD_INLINE void add_product(bool first, const Element* a, int64_t a_panel_stride, int64_t rows,
                               const Element* b, int64_t product_depth, Number* c) const {
    if (first)
      accumulate<Op, kRowStep, kStep, true, false>(a, a_panel_stride, rows, b, padded_dim,
                                                   padded_dim, product_depth, c, padded_dim,
                                                   nullptr);
    else
      accumulate<Op, kRowStep, kStep, false, false>(a, a_panel_stride, rows, b, padded_dim,
                                                    padded_dim, product_depth, c, padded_dim,
                                                    nullptr);
  }

  static VSOD_INLINE void wait_for(const int32_t* turn, int32_t mine) {
    for (int spins = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != mine; ++spins)
      if (spins > 1000) sched_yield();
  }

  void write_head_rows(bool needed, const Operand& x, const Task& task, int64_t first_row,
                       int64_t rows, const Number* src, Number scale) const {
    if (!needed) return;
    Storage* dst = head_data<Storage>(x, task.b, task.h) + first_row * x.strides.n;
    for (int64_t i = 0; i < rows; ++i)
      write_row<Storage, Number>(src + i * padded_dim, scale, p.head_dim, dst + i * x.strides.n,
                                 x.strides.d);
  }
};

template <class Op, class Storage>
void backward(const Problem& p, Parallel parallel) {
  using Run = Backward<Op, Storage>;
  Run state(p);
  parallel(
      [](void* context) {
        Run& run = *static_cast<Run*>(context);
        const int64_t heads = run.p.heads, per_batch = heads * run.query_blocks;
        for (int64_t i; (i = run.term_tasks.take()) < run.p.batch * per_batch;)
          run.terms(i / per_batch, i / run.query_blocks % heads, i % run.query_blocks);
      },
      &state);
  parallel(
      [](void* context) {
        Run& run = *static_cast<Run*>(context);
        Task task;
        while (find_task(run.p, run.tasks.take(), Run::key_blocks, &task)) run.run(task);
      },
      &state);
}

template <class Op, class Storage>
constexpr Kernel kernel() {
  return {packed_elements<Op>, dq_sum_elements<Op>, forward<Op, Storage>, backward<Op, Storage>};
}

}  // namespace

#if defined(__AVX512BF16__)
extern const Kernel bfloat16_kernel;
constexpr Kernel bfloat16_kernel = kernel<PairOp, BFloat16>();
#else
extern const Kernel kernels[kDtypeCount];
constexpr Kernel kernels[kDtypeCount] = {
    kernel<PlainOp<float>, float>(),
    kernel<PlainOp<double>, double>(),
    kernel<PlainOp<float>, Float16>(),
    kernel<PlainOp<float>, BFloat16>(),
};
#endif

}  // namespace VSOD_LEVEL
}  // namespace vsod
