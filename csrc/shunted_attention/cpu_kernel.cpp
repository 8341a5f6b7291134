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
// Backward: a task is (head, up to kBlockKeys keys).  It walks the queries in blocks and does all
// five products on one tile: S, dP = dO v^T, dV += P^T dO, dK += dS^T q, dQ += dS k.  dK and dV
// stay in the task's scratch; dQ is shared by the tasks of a head, and is added to in the order of
// the key blocks: a task waits for its turn at each query block (a wavefront, since tasks start
// in that order).  So there are no copies of dQ, and the bits do not depend on the threads.

#include "cpu.h"

#include <sched.h>

#include "../common/scratch.h"
#include "../common/simd.h"
#include "cpu_tile.h"

namespace vsod {
namespace VSOD_LEVEL {

using namespace shunted_attention;

namespace {

constexpr int kForwardQueries = 8 * kTileRows;
constexpr int kForwardKeys = 256;
constexpr int kBackwardQueries = 8 * kTileRows;
constexpr int kPad = 16;  // breaks the power-of-two stride of score tiles

constexpr int kTileColumnVectors = 2;
template <class Op>
constexpr int kTileColumns = kTileColumnVectors * kLanes<typename Op::Number>;
// Keys of one backward task, about 224: whole register tiles as rows (dK, dV) and columns (S, dP).
template <class Op>
constexpr int kBlockKeys = 448 / (kTileRows * kTileColumns<Op>)*(kTileRows * kTileColumns<Op> / 2);

// ------------------------------------------------------------------ products

// A tile of which `rows` and `columns` are wanted: all of it, or halves.
template <class Op, int kRowStep, int kStep, class Finish>
VSOD_INLINE void part_product(int64_t rows, int64_t columns, const typename Op::Element* a,
                              const typename Op::Element* b, int64_t b_stride, int64_t depth,
                              Finish finish) {
  constexpr int kHalf = kTileRows / 2;
  if (columns > kLanes<typename Op::Number>) {
    if (rows > kHalf)
      tile_product<Op, kTileRows, 2, kRowStep, kStep>(a, b, b_stride, depth, finish);
    else tile_product<Op, kHalf, 2, kRowStep, kStep>(a, b, b_stride, depth, finish);
  } else if (rows > kHalf) {
    tile_product<Op, kTileRows, 1, kRowStep, kStep>(a, b, b_stride, depth, finish);
  } else {
    tile_product<Op, kHalf, 1, kRowStep, kStep>(a, b, b_stride, depth, finish);
  }
}

// C[rows, columns] (+)= A @ B over register tiles.  scale_row: C is multiplied by row_scale[i]
// first; kFirst: C is not read.
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
      part_product<Op, kRowStep, kStep>(rows - i0, columns - j, a_panel, b + j, b_stride, depth,
                                        [&](int i, Vec<Number> s0, Vec<Number> s1)
                                            __attribute__((always_inline)) {
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

// ------------------------------------------------------------------ tasks

struct Task {
  const Group* group;
  int64_t b, h, block;  // h within the group
};

// Tasks of all groups, in the order of the groups, `blocks(group)` a head.
template <class Blocks>
VSOD_INLINE int64_t count_tasks(const Problem& p, Blocks blocks) {
  int64_t count = 0;
  for (int64_t g = 0; g < p.group_count; ++g)
    count += p.batch * p.groups[g].heads * blocks(p.groups[g]);
  return count;
}
template <class Blocks>
VSOD_INLINE Task find_task(const Problem& p, int64_t index, Blocks blocks) {
  for (int64_t g = 0;; ++g) {
    const Group& group = p.groups[g];
    const int64_t per_head = blocks(group), count = p.batch * group.heads * per_head;
    if (index < count) {
      const int64_t head = index / per_head;
      return {&group, head / group.heads, head % group.heads, index % per_head};
    }
    index -= count;
  }
}

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

// ------------------------------------------------------------------ forward

template <class Op>
struct ForwardLayout {
  using Element = typename Op::Element;
  int64_t depth;       // elements along head_dim
  int64_t padded_dim;  // numbers, whole register tiles
  explicit ForwardLayout(int64_t head_dim)
      : depth(ceil_div(head_dim, Op::kDepthStep)),
        padded_dim(round_up(head_dim, kTileColumns<Op>)) {}
  // A head's packed copy: key panels, then value rows.
  int64_t key_elements(int64_t length) const { return round_up(length, kTileColumns<Op>) * depth; }
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
  static constexpr bool kPairs = Op::kDepthStep == 2;
  static constexpr int kScoreStride = kForwardKeys + kPad;
  static constexpr int kProbStride =  // of P: pairs, or the scores in place
      kPairs ? kForwardKeys / Op::kDepthStep + kPad : kScoreStride;
  static constexpr Number kLowest = -Number(INFINITY);

  const Problem& p;
  ForwardLayout<Op> layout;
  Number factor;  // |scale| in base 2
  bool negate;    // q is negated where scale is negative, so that the maximum is one of S

  explicit Forward(const Problem& problem)
      : p(problem), layout(problem.head_dim), factor(fabs(problem.scale) * kLog2e),
        negate(problem.scale < 0) {}

  Element* packed_head(const Group& group, int64_t b, int64_t h) const {
    return static_cast<Element*>(group.packed) +
           (b * group.heads + h) * packed_elements<Op>(group.length, p.head_dim);
  }

  static int64_t key_blocks(const Group& group) { return ceil_div(group.length, kForwardKeys); }

  // Rows are staged with room for whole tiles.
  struct PackPlaces {
    Element* staged;
    PackPlaces(Scratch& scratch, const Forward& run)
        : staged(scratch.piece<Element>(kForwardKeys * run.layout.padded_dim)) {}
  };

  // Packs kForwardKeys keys and values of one head.
  void pack(const Task& task, const PackPlaces& at) const {
    const Group& group = *task.group;
    const int64_t first = task.block * kForwardKeys;
    const int64_t keys = smaller(kForwardKeys, group.length - first);
    const int64_t stride = layout.padded_dim;
    Element* head = packed_head(group, task.b, task.h);

    for (int64_t j = 0; j < keys; j += kColumns) {
      read_rows<Op>(head_rows<Storage>(group.k, task.b, task.h, first + j),
                    smaller(kColumns, keys - j), kColumns, p.head_dim,
                    layout.depth * Op::kDepthStep, false, at.staged, stride);
      transpose_panel<kColumns>(at.staged, stride, layout.depth, head + (first + j) * layout.depth);
    }

    const Rows<Storage> values = head_rows<Storage>(group.v, task.b, task.h, first);
    Element* packed =
        head + layout.key_elements(group.length) + first / Op::kDepthStep * layout.padded_dim;
    if constexpr (kPairs) {
      read_rows<Op>(values, keys, round_up(keys, Op::kDepthStep), p.head_dim, layout.padded_dim,
                    false, at.staged, stride);
      rows_to_depth<Op>(at.staged, stride, keys, layout.padded_dim, packed);
    } else {
      read_rows<Op>(values, keys, keys, p.head_dim, layout.padded_dim, false, packed, stride);
    }
  }

  struct Places {
    Element *q_panels, *staged;
    Number* scores;
    Element* probs;  // where P is not pairs, the scores in place
    Number *sums_out, *block_max, *row_max, *row_sum, *correction;

    Places(Scratch& scratch, const Forward& run) {
      const int64_t stride = run.layout.padded_dim;
      q_panels = scratch.piece<Element>(kForwardQueries * run.layout.depth + kN);
      staged = scratch.piece<Element>(kTileRows * stride);
      scores = scratch.piece<Number>(kForwardQueries * kScoreStride);
      probs = kPairs ? scratch.piece<Element>(kForwardQueries * kProbStride)
                     : reinterpret_cast<Element*>(scores);
      sums_out = scratch.piece<Number>(kForwardQueries * stride);
      block_max = scratch.piece<Number>(kForwardQueries * kN);
      row_max = scratch.piece<Number>(kForwardQueries);
      row_sum = scratch.piece<Number>(kForwardQueries);
      correction = scratch.piece<Number>(kForwardQueries);
    }
  };

  // The queries of a task.
  struct Queries {
    int64_t first, count, rows;  // rows: whole register tiles
  };

  void run(const Task& task, const Places& at) const {
    const Group& group = *task.group;
    const int64_t first = task.block * kForwardQueries;
    const int64_t count = smaller(kForwardQueries, p.queries - first);
    const Queries queries{first, count, round_up(count, kTileRows)};
    const int64_t head = group.first_head + task.h;
    read_queries(task.b, head, queries, at);
    const Element* packed_keys = packed_head(group, task.b, task.h);
    const Element* packed_values = packed_keys + layout.key_elements(group.length);
    for (int64_t key = 0; key < group.length; key += kForwardKeys) {
      const int64_t keys = smaller(kForwardKeys, group.length - key);
      score(packed_keys + key * layout.depth, keys, queries.count, at);
      softmax(keys, queries, at);
      add_values(key == 0, packed_values + key / Op::kDepthStep * layout.padded_dim,
                 ceil_div(keys, Op::kDepthStep), queries.count, at);
    }
    write(task.b, head, queries, at);
  }

  VSOD_INLINE void read_queries(int64_t b, int64_t head, const Queries& queries,
                                const Places& at) const {
    const int64_t stride = layout.padded_dim;
    for (int64_t i = 0; i < queries.count; i += kTileRows) {
      read_rows<Op>(head_rows<Storage>(p.q, b, head, queries.first + i),
                    smaller(kTileRows, queries.count - i), kTileRows, p.head_dim,
                    layout.depth * Op::kDepthStep, negate, at.staged, stride);
      transpose_panel<kTileRows>(at.staged, stride, layout.depth, at.q_panels + i * layout.depth);
    }
    for (int64_t i = 0; i < queries.rows; ++i) at.row_max[i] = kLowest, at.row_sum[i] = 0;
  }

  // S [rows, keys] = q k^T, and its maximum, lane by lane.
  VSOD_INLINE void score(const Element* packed_keys, int64_t keys, int64_t rows,
                         const Places& at) const {
    for (int64_t j = 0; j < keys; j += kColumns) {
      const Element* k_panel = packed_keys + j * layout.depth;
      const int valid = int(smaller(kColumns, keys - j));
      for (int64_t i0 = 0; i0 < rows; i0 += kTileRows)
        part_product<Op, 1, kTileRows>(
            rows - i0, valid, at.q_panels + i0 * layout.depth, k_panel, kColumns, layout.depth,
            [&](int i, Vec<Number> s0, Vec<Number> s1) __attribute__((always_inline)) {
              Number* row = at.scores + (i0 + i) * kScoreStride + j;
              Number* max = at.block_max + (i0 + i) * kN;
              store(row, s0);
              store(row + kN, s1);
              if (__builtin_expect(valid < kColumns, 0)) {
                s0 = keep_first(s0, valid, kLowest);
                s1 = keep_first(s1, valid - kN, kLowest);
              }
              const Vec<Number> best = maximum<Number>(s0, s1);
              store(max, j == 0 ? best : maximum<Number>(best, load(max)));
            });
    }
  }

  // P of a block of keys, its row sums, and what the sums so far are to be multiplied by.
  VSOD_INLINE void softmax(int64_t keys, const Queries& queries, const Places& at) const {
    for (int64_t i = 0; i < queries.count; ++i) {
      const Number best = horizontal_max<Number>(load(at.block_max + i * kN));
      const Number before = at.row_max[i], max = best > before ? best : before;
      // A row that has seen only -inf so far: 0 in its place gives P = 0, not NaN.
      const Number finite = max == kLowest ? 0 : max;
      at.correction[i] = before == kLowest ? 0 : before == max ? 1 : exp2((before - max) * factor);
      at.row_max[i] = max;
      const Number sum =
          row_softmax(at.scores + i * kScoreStride, keys, finite, at.probs + i * kProbStride);
      at.row_sum[i] = at.row_sum[i] * at.correction[i] + sum;
    }
    for (int64_t i = queries.count; i < queries.rows; ++i) at.correction[i] = 0;
  }

  // P = exp2(factor * (S - max)) of one row, in place, as pairs in `pairs`.  Returns its sum.
  VSOD_INLINE Number row_softmax(Number* scores, int64_t keys, Number max, void* pairs) const {
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

  // O [rows, head_dim] = O * correction + P v
  VSOD_INLINE void add_values(bool first, const Element* v, int64_t depth, int64_t rows,
                              const Places& at) const {
    const int64_t stride = layout.padded_dim;
    if (first)
      accumulate<Op, kProbStride, 1, true, true>(at.probs, kTileRows * kProbStride, rows, v, stride,
                                                 p.head_dim, depth, at.sums_out, stride,
                                                 at.correction);
    else
      accumulate<Op, kProbStride, 1, false, true>(at.probs, kTileRows * kProbStride, rows, v,
                                                  stride, p.head_dim, depth, at.sums_out, stride,
                                                  at.correction);
  }

  VSOD_INLINE void write(int64_t b, int64_t head, const Queries& queries, const Places& at) const {
    Storage* out = head_data<Storage>(p.out, b, head) + queries.first * p.out.strides.n;
    Number* lse = static_cast<Number*>(p.lse) + (b * p.heads + head) * p.queries + queries.first;
    for (int64_t i = 0; i < queries.count; ++i) {
      write_row<Storage, Number>(at.sums_out + i * layout.padded_dim, 1 / at.row_sum[i], p.head_dim,
                                 out + i * p.out.strides.n, p.out.strides.d);
      const Number log2_sum = at.row_max[i] == Number(INFINITY) ? 0 : log2(at.row_sum[i]);
      lse[i] = (at.row_max[i] * factor + log2_sum) * Number(kLn2);
    }
  }
};

template <class Op, class Storage>
int64_t forward(const Problem& p, Parallel parallel) {
  using Run = Forward<Op, Storage>;
  using PackPlaces = typename Run::PackPlaces;
  using Places = typename Run::Places;
  const Run run(p);
  const int64_t missing = each_task<PackPlaces>(
      parallel, count_tasks(p, Run::key_blocks), run,
      [&](int64_t i, const PackPlaces& at) { run.pack(find_task(p, i, Run::key_blocks), at); });
  if (missing) return missing;
  const auto blocks = [&](const Group&) { return ceil_div(p.queries, kForwardQueries); };
  return each_task<Places>(parallel, count_tasks(p, blocks), run, [&](int64_t i, const Places& at) {
    run.run(find_task(p, i, blocks), at);
  });
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
  static constexpr bool kPairs = Op::kDepthStep == 2;
  static constexpr int kKeys = kBlockKeys<Op>;
  static constexpr int kQueries = kBackwardQueries;
  static constexpr int kStride = kKeys + kPad;  // of score tiles, in numbers or q pairs
  static constexpr int kKeyStride = kKeys / Op::kDepthStep + kPad;  // of dS for dQ
  static_assert(kKeys % kTileRows == 0 && kKeys % kColumns == 0 && kKeys > 0);

  const Problem& p;
  int64_t depth, padded_dim, query_blocks;
  Number factor;  // scale in base 2

  explicit Backward(const Problem& problem)
      : p(problem), depth(ceil_div(problem.head_dim, Op::kDepthStep)),
        padded_dim(round_up(problem.head_dim, kTileColumns<Op>)),
        query_blocks(ceil_div(problem.queries, kQueries)), factor(problem.scale * kLog2e) {}

  // Blocks of a head are about equal: each waits for the one before, so that a short one beside a
  // long one would leave the machine to one thread.
  static int64_t block_keys(const Group& group) {
    return round_up(ceil_div(group.length, ceil_div(group.length, kKeys)), kColumns);
  }
  static int64_t key_blocks(const Group& group) {
    return ceil_div(group.length, block_keys(group));
  }

  Number* row_term(int which, int64_t b, int64_t head) const {
    return static_cast<Number*>(p.row_terms) + ((which * p.batch + b) * p.heads + head) * p.queries;
  }

  // lse in base 2, and delta = sum(dO * out), of one block of rows.
  void terms(int64_t b, int64_t head, int64_t block) const {
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

  struct Places {
    Element *staged, *k_panels, *v_panels, *k_rows, *q_panels, *do_panels, *q_rows, *do_rows;
    Number *dk_sum, *dv_sum, *probs, *dscores, *lse2, *delta;
    // P and dS as the operands of the last three products.  Plain numbers are used as they are;
    // pairs are joined along the queries (for dV and dK) and along the keys (for dQ).
    Element *probs_by_query, *ds_by_query, *ds_by_key;

    Places(Scratch& scratch, const Backward& run) {
      const int64_t stride = run.padded_dim, depth = run.depth;
      staged = scratch.piece<Element>((kKeys > kQueries ? kKeys : kQueries) * stride);
      k_panels = scratch.piece<Element>(kKeys * depth);
      v_panels = scratch.piece<Element>(kKeys * depth);
      k_rows = scratch.piece<Element>(kKeys / Op::kDepthStep * stride);
      q_panels = scratch.piece<Element>(kQueries * depth + kN);
      do_panels = scratch.piece<Element>(kQueries * depth + kN);
      q_rows = scratch.piece<Element>(kQueries / Op::kDepthStep * stride);
      do_rows = scratch.piece<Element>(kQueries / Op::kDepthStep * stride);
      dk_sum = scratch.piece<Number>(kKeys * stride);
      dv_sum = scratch.piece<Number>(kKeys * stride);
      probs = scratch.piece<Number>(kQueries * kStride);
      dscores = scratch.piece<Number>(kQueries * kStride);
      lse2 = scratch.piece<Number>(kQueries);
      delta = scratch.piece<Number>(kQueries);
      if constexpr (kPairs) {
        probs_by_query = scratch.piece<Element>(kQueries / 2 * kStride);
        ds_by_query = scratch.piece<Element>(kQueries / 2 * kStride);
        ds_by_key = scratch.piece<Element>(kQueries * kKeyStride);
      } else {
        probs_by_query = probs;
        ds_by_query = ds_by_key = dscores;
      }
    }
  };

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
          store(along_keys + r * kKeyStride + j / 2,
                Vec<uint32_t>(_mm512_cvtne2ps_pbh(__m512(load(scores + r * kStride + j + kN)),
                                                  __m512(load(scores + r * kStride + j)))));
    }
  }
#endif

  // A task: the keys of a block, and which gradients come from them.
  struct Keys {
    const Task& task;
    const Group& group;
    int64_t head, first, count;  // head: of q
    bool need_dq, need_dk, need_dv;

    Keys(const Problem& p, const Task& of)
        : task(of), group(*of.group), head(of.group->first_head + of.h),
          first(of.block * block_keys(*of.group)),
          count(smaller(block_keys(*of.group), of.group->length - first)), need_dq(p.dq.data),
          need_dk(of.group->dk.data), need_dv(of.group->dv.data) {}
    bool need_ds() const { return need_dq || need_dk; }
  };
  // The queries of one block of a task's walk.
  struct Queries {
    int64_t block, first, count, rows;  // rows: whole register tiles
  };

  void run(const Task& task, const Places& at) const {
    const Keys keys(p, task);
    if (!keys.need_ds() && !keys.need_dv) return;
    // The softmax of a single key is constant: dQ and dK are zero, not the noise of dP - delta.
    const Number scale = keys.group.length == 1 ? 0 : Number(p.scale);
    read_keys(keys, at);
    for (int64_t block = 0; block < query_blocks; ++block) {
      const int64_t first = block * kQueries, count = smaller(kQueries, p.queries - first);
      const Queries queries{block, first, count, round_up(count, kTileRows)};
      read_queries(keys, queries, at);
      score(keys, queries, at);
      add_key_gradients(keys, queries, at);
      if (keys.need_dq) add_query_gradients(keys, queries, scale, at);
    }
    write_head_rows(keys.need_dk, keys.group.dk, keys, at.dk_sum, scale);
    write_head_rows(keys.need_dv, keys.group.dv, keys, at.dv_sum, Number(1));
  }

  VSOD_INLINE void read_keys(const Keys& keys, const Places& at) const {
    const int64_t stride = padded_dim, columns = round_up(keys.count, kColumns);
    const auto panels = [&](const Operand& from, Element* to) {
      read_rows<Op>(head_rows<Storage>(from, keys.task.b, keys.task.h, keys.first), keys.count,
                    columns, p.head_dim, stride, false, at.staged, stride);
      for (int64_t j = 0; j < keys.count; j += kColumns)
        transpose_panel<kColumns>(at.staged + j * stride, stride, depth, to + j * depth);
    };
    panels(keys.group.k, at.k_panels);
    if (keys.need_dq) rows_to_depth<Op>(at.staged, stride, keys.count, stride, at.k_rows);
    if (keys.need_ds()) panels(keys.group.v, at.v_panels);
  }

  VSOD_INLINE void read_queries(const Keys& keys, const Queries& queries, const Places& at) const {
    const int64_t stride = padded_dim, b = keys.task.b;
    for (int64_t i = 0; i < queries.rows; ++i) {
      const bool there = i < queries.count;
      at.lse2[i] = there ? row_term(0, b, keys.head)[queries.first + i] : Number(INFINITY);
      at.delta[i] = there ? row_term(1, b, keys.head)[queries.first + i] : Number(0);
    }
    const auto stage = [&](const Operand& from) {
      read_rows<Op>(head_rows<Storage>(from, b, keys.head, queries.first), queries.count,
                    round_up(queries.rows, 2), p.head_dim, stride, false, at.staged, stride);
    };
    const auto panels = [&](Element* to) {
      for (int64_t i = 0; i < queries.rows; i += kTileRows)
        transpose_panel<kTileRows>(at.staged + i * stride, stride, depth, to + i * depth);
    };
    stage(p.q);
    panels(at.q_panels);
    if (keys.need_dk) rows_to_depth<Op>(at.staged, stride, queries.count, stride, at.q_rows);
    stage(p.grad_out);
    if (keys.need_ds()) panels(at.do_panels);
    if (keys.need_dv) rows_to_depth<Op>(at.staged, stride, queries.count, stride, at.do_rows);
  }

  // P [rows, keys] = exp2(factor * q k^T - lse),  dS [rows, keys] = P * (dO v^T - delta)
  VSOD_INLINE void score(const Keys& keys, const Queries& queries, const Places& at) const {
    for (int64_t j = 0; j < keys.count; j += kColumns)
      for (int64_t i0 = 0; i0 < queries.count; i0 += kTileRows)
        part_product<Op, 1, kTileRows>(
            queries.count - i0, keys.count - j, at.q_panels + i0 * depth, at.k_panels + j * depth,
            kColumns, depth,
            [&](int i, Vec<Number> s0, Vec<Number> s1) __attribute__((always_inline)) {
              Number* row = at.probs + (i0 + i) * kStride + j;
              const Vec<Number> shift = broadcast(at.lse2[i0 + i]);
              store(row, exp2_nonpositive<Op::kExpDegree>(s0 * factor - shift));
              store(row + kN, exp2_nonpositive<Op::kExpDegree>(s1 * factor - shift));
            });
    if (!keys.need_ds()) return;
    for (int64_t j = 0; j < keys.count; j += kColumns) {
      const int valid = int(smaller(kColumns, keys.count - j));
      for (int64_t i0 = 0; i0 < queries.count; i0 += kTileRows)
        part_product<Op, 1, kTileRows>(
            queries.count - i0, valid, at.do_panels + i0 * depth, at.v_panels + j * depth, kColumns,
            depth, [&](int i, Vec<Number> s0, Vec<Number> s1) __attribute__((always_inline)) {
              const int64_t place = (i0 + i) * kStride + j;
              const Vec<Number> shift = broadcast(at.delta[i0 + i]);
              s0 = load(at.probs + place) * (s0 - shift);
              s1 = load(at.probs + place + kN) * (s1 - shift);
              if (__builtin_expect(valid < kColumns, 0)) {
                s0 = keep_first(s0, valid, Number(0));
                s1 = keep_first(s1, valid - kN, Number(0));
              }
              store(at.dscores + place, s0);
              store(at.dscores + place + kN, s1);
            });
    }
  }

  // dV [keys, head_dim] += P^T dO,  dK [keys, head_dim] += dS^T q
  VSOD_INLINE void add_key_gradients(const Keys& keys, const Queries& queries,
                                     const Places& at) const {
#if defined(__AVX512BF16__)
    if constexpr (kPairs) {
      const int64_t columns = round_up(keys.count, kColumns);
      if (keys.need_dv) pair_up(at.probs, queries.count, columns, at.probs_by_query, nullptr);
      if (keys.need_ds()) pair_up(at.dscores, queries.count, columns, at.ds_by_query, at.ds_by_key);
    }
#endif
    const int64_t query_depth = ceil_div(queries.count, Op::kDepthStep);
    const bool first = queries.block == 0;
    if (keys.need_dv)
      add_product<1, kStride>(first, at.probs_by_query, kTileRows, keys.count, at.do_rows,
                              query_depth, at.dv_sum);
    if (keys.need_dk)
      add_product<1, kStride>(first, at.ds_by_query, kTileRows, keys.count, at.q_rows, query_depth,
                              at.dk_sum);
  }

  // dQ [rows, head_dim] += dS k, when the key blocks before this one have been added; the last one
  // writes the sum out.
  VSOD_INLINE void add_query_gradients(const Keys& keys, const Queries& queries, Number scale,
                                       const Places& at) const {
    const int64_t b = keys.task.b, key_block = keys.task.block;
    Number* dq_sum = static_cast<Number*>(p.dq_sum) +
                     (b * p.heads + keys.head) * dq_sum_elements<Op>(p.queries, p.head_dim) +
                     queries.first * padded_dim;
    int32_t* turn = p.turns + (b * p.heads + keys.head) * query_blocks + queries.block;
    wait_for(turn, int32_t(key_block));
    add_product<kKeyStride, 1>(key_block == 0, at.ds_by_key, kTileRows * kKeyStride, queries.count,
                               at.k_rows, ceil_div(keys.count, Op::kDepthStep), dq_sum);
    __atomic_store_n(turn, int32_t(key_block) + 1, __ATOMIC_RELEASE);
    if (key_block + 1 < key_blocks(keys.group)) return;
    Storage* dq = head_data<Storage>(p.dq, b, keys.head) + queries.first * p.dq.strides.n;
    for (int64_t i = 0; i < queries.count; ++i)
      write_row<Storage, Number>(dq_sum + i * padded_dim, scale, p.head_dim,
                                 dq + i * p.dq.strides.n, p.dq.strides.d);
  }

  template <int kRowStep, int kStep>
  VSOD_INLINE void add_product(bool first, const Element* a, int64_t a_panel_stride, int64_t rows,
                               const Element* b, int64_t product_depth, Number* c) const {
    if (first)
      accumulate<Op, kRowStep, kStep, true, false>(a, a_panel_stride, rows, b, padded_dim,
                                                   p.head_dim, product_depth, c, padded_dim,
                                                   nullptr);
    else
      accumulate<Op, kRowStep, kStep, false, false>(a, a_panel_stride, rows, b, padded_dim,
                                                    p.head_dim, product_depth, c, padded_dim,
                                                    nullptr);
  }

  static VSOD_INLINE void wait_for(const int32_t* turn, int32_t mine) {
    for (int spins = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != mine; ++spins)
      if (spins > 1000) sched_yield();
  }

  void write_head_rows(bool needed, const Operand& x, const Keys& keys, const Number* src,
                       Number scale) const {
    if (!needed) return;
    Storage* dst = head_data<Storage>(x, keys.task.b, keys.task.h) + keys.first * x.strides.n;
    for (int64_t i = 0; i < keys.count; ++i)
      write_row<Storage, Number>(src + i * padded_dim, scale, p.head_dim, dst + i * x.strides.n,
                                 x.strides.d);
  }
};

template <class Op, class Storage>
int64_t backward(const Problem& p, Parallel parallel) {
  using Run = Backward<Op, Storage>;
  using Places = typename Run::Places;
  const Run run(p);
  const int64_t per_batch = p.heads * run.query_blocks;
  each_task(parallel, p.batch * per_batch, [&](int64_t i) {
    run.terms(i / per_batch, i / run.query_blocks % p.heads, i % run.query_blocks);
  });
  return each_task<Places>(
      parallel, count_tasks(p, Run::key_blocks), run,
      [&](int64_t i, const Places& at) { run.run(find_task(p, i, Run::key_blocks), at); });
}

template <class Op, class Storage>
constexpr Kernel kKernel = {packed_elements<Op>, dq_sum_elements<Op>, forward<Op, Storage>,
                            backward<Op, Storage>};

}  // namespace

extern const Kernel* const shunted_attention_kernels[];
#if defined(__AVX512BF16__)
const Kernel* const shunted_attention_kernels[] = {nullptr, nullptr, nullptr,
                                                   &kKernel<PairOp, BFloat16>};
#else
const Kernel* const shunted_attention_kernels[] = {
    &kKernel<PlainOp<float>, float>, &kKernel<PlainOp<double>, double>,
    &kKernel<PlainOp<float>, Float16>, &kKernel<PlainOp<float>, BFloat16>};
#endif

}  // namespace VSOD_LEVEL
}  // namespace vsod
