// A matrix of few rows times the weights of a linear layer, for one SIMD level: float32.
//
// What.  out (M, O) = x (M, K) @ weight (O, K)^T + bias, for M of some dozens to some hundreds:
// tokens, or blocks of tokens, whose numbers are gathered from where they lie.
//
// How.  A library's product first copies both operands into its own order, and for few rows the
// copy of the weights costs as much as the product.  Here the weights are the rows of the register
// tile (kTileRows of them, copied as they lie, a block of the depth at a time, which stays in the
// L1 cache) and x is its columns:
//     column panels  [depth][2 vectors of rows of x], the last one of one vector
//     single rows    [depth] for what is left of M where that is less than half a vector: a dot
//                    product a weight costs less than a vector that is mostly empty

#include "cpu_linear.h"

#include "../common/scratch.h"
#include "../common/simd.h"
#include "cpu_tile.h"

namespace vsod {
namespace VSOD_LEVEL {

using namespace shunted_attention;

namespace {

constexpr int kN = kLanes<float>;
constexpr int kPanel = 2 * kN;              // columns
constexpr int kDepth = 64;                  // of a block of weights
constexpr int kWeightStride = kDepth + 16;  // rows of a block do not meet in one L1 set
constexpr int kTiles = 4;
constexpr int64_t kInCache = 1 << 16;  // numbers of x
constexpr int kTileSquares = (kTileRows + kN - 1) / kN;

// M rows of x as whole vectors and single rows.
struct Columns {
  int64_t vectors, singles;
  explicit Columns(int64_t rows) : vectors(rows / kN), singles(rows % kN) {
    if (singles > kN / 2) ++vectors, singles = 0;
  }
  int64_t width() const { return vectors * kN; }
};

int64_t packed_numbers(int64_t rows, int64_t depth) {
  const Columns columns(rows);
  return (columns.width() + columns.singles) * depth;
}

void pack(const Gathered& x, float* packed, Parallel parallel) {
  const Columns columns(x.rows);
  const int64_t depth = x.parts * x.channels, tasks = columns.vectors + (columns.singles > 0);
  each_task(parallel, tasks, [&](int64_t task) {
    if (task == columns.vectors) {
      for (int64_t s = 0; s < columns.singles; ++s) {
        float* row = packed + columns.width() * depth + s * depth;
        for (int64_t j = 0; j < x.parts; ++j) {
          const float* from = x.data + x.starts[(columns.width() + s) * x.parts + j];
          for (int64_t c = 0; c < x.channels; ++c) row[c * x.parts + j] = from[c];
        }
      }
      return;
    }
    const int64_t first = task * kN, panel = task / 2 * kPanel;
    const int64_t stride = smaller(kPanel, columns.width() - panel);
    float* to = packed + panel * depth + (first - panel);
    for (int64_t j = 0; j < x.parts; ++j)
      for (int64_t c = 0; c < x.channels; c += kN) {
        Vec<float> square[kN];
#pragma GCC unroll 16
        for (int r = 0; r < kN; ++r)  // rows past the last are the last
          square[r] = load(x.data + x.starts[smaller(first + r, x.rows - 1) * x.parts + j] + c);
        transpose_square<float>(square);
#pragma GCC unroll 16
        for (int r = 0; r < kN; ++r) store(to + ((c + r) * x.parts + j) * stride, square[r]);
      }
  });
}

// sum (kTileRows, kVectors vectors, rows `stride` apart) += weights @ columns of one block
template <int kVectors>
VSOD_INLINE void add_product(const float* weights, const float* columns, int64_t depth, bool first,
                             float* sum, int64_t stride) {
  tile_product<PlainOp<float>, kTileRows, kVectors, kWeightStride, 1>(
      weights, columns, kVectors * kN, depth,
      [&](int i, Vec<float> s0, Vec<float> s1) __attribute__((always_inline)) {
        float* at = sum + i * stride;
        store(at, first ? s0 : load(at) + s0);
        if constexpr (kVectors == 2) store(at + kN, first ? s1 : load(at + kN) + s1);
      });
}

// sum[i] (vectors, still to be added up) += weights[i] * row of one block
VSOD_INLINE void add_dots(const float* weights, const float* row, int64_t depth, bool first,
                          float* sum) {
  Vec<float> dots[kTileRows] = {};
  for (int64_t k = 0; k < depth; k += kN) {
    const Vec<float> x = load(row + k);
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) dots[i] += load(weights + i * kWeightStride + k) * x;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i)
    store(sum + i * kN, first ? dots[i] : load(sum + i * kN) + dots[i]);
}

struct Run {
  Columns columns;
  const float *packed, *weight, *bias;
  int64_t rows, depth, outputs;
  float* out;

  // Tiles of a task: several where x is too large to be read from the L2 cache for each of them.
  int64_t tiles() const { return columns.width() * depth > kInCache ? kTiles : 1; }

  struct Places {
    float *weights, *sums, *dots;  // sums and dots: of each tile
    int64_t sums_stride, dots_stride;
    Places(Scratch& scratch, const Run& run)
        : sums_stride(kTileSquares * kN * run.columns.width()),
          dots_stride(kTileRows * kN * run.columns.singles) {
      weights = scratch.piece<float>(kTileRows * kWeightStride);
      sums = scratch.piece<float>(run.tiles() * sums_stride);
      dots = scratch.piece<float>(run.tiles() * dots_stride);
    }
  };

  void task(int64_t index, const Places& at) const {
    const int64_t first = index * tiles() * kTileRows;
    const int64_t end = smaller(first + tiles() * kTileRows, outputs);
    for (int64_t k = 0; k < depth; k += kDepth)
      for (int64_t tile = 0, i = first; i < end; ++tile, i += kTileRows) {
        const int64_t next = i + kTileRows < end ? kTileRows * depth : (first - i) * depth + kDepth;
        copy_weights(i, k, next, at.weights);
        multiply(k, at.weights, at.sums + tile * at.sums_stride, at.dots + tile * at.dots_stride);
      }
    for (int64_t tile = 0, i = first; i < end; ++tile, i += kTileRows)
      write(i, at.sums + tile * at.sums_stride, at.dots + tile * at.dots_stride);
  }

  // One block of the rows of a tile; the next one, `next` numbers away, is on its way meanwhile.
  VSOD_INLINE void copy_weights(int64_t first, int64_t k, int64_t next, float* to) const {
    const int64_t steps = smaller(kDepth, depth - k);
    for (int64_t i = 0; i < kTileRows; ++i)
      if (first + i < outputs) {
        const float* row = weight + (first + i) * depth + k;
        for (int64_t s = 0; s < steps; s += kN) {
          store(to + i * kWeightStride + s, load(row + s));
          __builtin_prefetch(row + next + s, 0, 2);
        }
      } else {
        memset(to + i * kWeightStride, 0, steps * sizeof(float));
      }
  }

  VSOD_INLINE void multiply(int64_t k, const float* weights, float* sums, float* dots) const {
    const int64_t steps = smaller(kDepth, depth - k), width = columns.width();
    for (int64_t panel = 0; panel < width; panel += kPanel) {
      const float* x = packed + panel * depth;
      if (panel + kPanel <= width)
        add_product<2>(weights, x + k * kPanel, steps, k == 0, sums + panel, width);
      else add_product<1>(weights, x + k * kN, steps, k == 0, sums + panel, width);
    }
    for (int64_t s = 0; s < columns.singles; ++s)
      add_dots(weights, packed + (width + s) * depth + k, steps, k == 0, dots + s * kTileRows * kN);
  }

  VSOD_INLINE void write(int64_t first, const float* sums, const float* dots) const {
    const int64_t width = columns.width(), count = smaller(kTileRows, outputs - first);
    float shift[kTileSquares * kN] = {};
    for (int64_t i = 0; i < count; ++i) shift[i] = bias[first + i];
    for (int64_t m = 0; m < width; m += kN)
      for (int i = 0; i < kTileRows; i += kN) {
        Vec<float> square[kN];
#pragma GCC unroll 16
        for (int r = 0; r < kN; ++r) square[r] = load(sums + (i + r) * width + m);
        transpose_square<float>(square);
        const int lanes = kTileRows - i < kN ? kTileRows - i : kN;
        const int there = int(smaller(kN, rows - m));
        float* to = out + m * outputs + first + i;
        if (count == kTileRows) {  // as many lanes as the compiler knows
          for (int r = 0; r < there; ++r, to += outputs) {
            const Vec<float> sum = square[r] + load(shift + i);
            memcpy(to, &sum, lanes * sizeof(float));
          }
        } else {
          for (int r = 0; r < there; ++r, to += outputs) {
            const Vec<float> sum = square[r] + load(shift + i);
            for (int l = 0; l < smaller(lanes, count - i); ++l) to[l] = sum[l];
          }
        }
      }
    for (int64_t s = 0; s < columns.singles; ++s)
      for (int64_t i = 0; i < count; ++i)
        out[(width + s) * outputs + first + i] =
            shift[i] + horizontal_sum<float>(load(dots + (s * kTileRows + i) * kN));
  }
};

int64_t run(const float* packed, int64_t rows, int64_t depth, const float* weight,
            const float* bias, int64_t outputs, float* out, Parallel parallel) {
  const Run run{Columns(rows), packed, weight, bias, rows, depth, outputs, out};
  return each_task<Run::Places>(parallel, ceil_div(outputs, run.tiles() * kTileRows), run,
                                [&](int64_t i, const Run::Places& at) { run.task(i, at); });
}

constexpr Linear kLinear = {packed_numbers, pack, run};

}  // namespace

extern const Linear* const linear_kernels[];
#if defined(__AVX512BF16__)
const Linear* const linear_kernels[] = {nullptr};
#else
const Linear* const linear_kernels[] = {&kLinear};
#endif

}  // namespace VSOD_LEVEL
}  // namespace vsod
