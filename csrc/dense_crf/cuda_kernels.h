// The CUDA kernels of dense_crf as functions of one index: a point, a vertex, a (point, vertex)
// pair.  cuda.cu runs each over all its indices in one launch; cuda_on_host.cpp runs them in loops,
// so that they are tested on machines without a GPU.  No kernel needs a barrier: what has to be
// complete before a step is complete because it is an earlier launch.  One kernel is one struct
// here; their order, with sorts and scans between them, is in cuda_run.h.
//
// The mathematics is that of cpu_kernel.cpp: the same simplices, the same 64-bit keys, a vertex is
// the rank of its key, and a foreground probability is one channel z = Q_1 - Q_0.
//
// Building is a sort, not a hash table.  All (point, vertex) pairs are sorted by key, stably.  This
// gives vertices (runs of equal keys) and, at no further cost, for each vertex the list of its
// pairs in a fixed order.  So the splat is a sum over a list instead of atomic additions, and its
// bits are the same on every run; atomics into few hot vertices (a flat sky) would also wait for
// one another.
//
// Long lists are cut into segments of kSegment pairs, counted from the start of the list: a flat
// image has lists of 10^4 pairs and more.  So a frame gives the same bits alone or in a batch.
#pragma once

#include <math.h>
#include <stdint.h>

#include "../common/host_device.h"
#include "geometry.h"

namespace vsod {
namespace dense_crf_cuda {

using VSOD_LEVEL::Geometry;

constexpr int kSegment = 128;  // pairs
constexpr int kLanes = 4;      // threads a segment with one channel: 4 x 8 bytes are a sector
constexpr float kClip = 1e-5f;
constexpr float kTiny = 1e-20f;

// What turns slice(blur(splat(1))) into K 1.
template <int D>
constexpr float kAlpha = 1.0f / (1.0f + 1.0f / (1 << D));

// A (point, vertex) pair in the list of its vertex.
struct alignas(8) Entry {
  int32_t point;
  float weight;
};

struct alignas(8) Segment {
  uint32_t begin, end;  // entries
};

// A lattice over `points` points.  Pair k * points + n is corner k of point n.  It serves `copies`
// images: 1 where the points are those of all images together (each has vertices of its own).
struct Lattice {
  int64_t points, copies;
  int64_t vertices, segments;  // segments: the most there can be; some are empty
  const float* weights;        // [D + 1][points]
  const int32_t* ids;          // [D + 1][points]
  const Entry* entries;        // [(D + 1) * points], by vertex
  const uint32_t* rows;        // [vertices + 1], where the list of a vertex starts
  const Segment* segment;      // [segments]
  const int32_t* neighbours;   // [D + 1][2][vertices], -1 where there is none
  const float* norm;           // [points], the diagonal of S

  // Where the segments of vertex v start.  A list of n pairs takes ceil(n / kSegment) slots, and
  // this leaves at least so many, without a scan.
  VSOD_BOTH int64_t first_segment(int64_t v) const { return rows[v] / kSegment + v; }
};

VSOD_BOTH float sigmoid(float x) {
  const float e = expf(-fabsf(x)), y = 1.0f / (1.0f + e);
  return x < 0.0f ? e * y : y;
}
// Q_1 - Q_0 = sigmoid(x) - sigmoid(-x) = tanh(x / 2) of the logit x.
VSOD_BOTH float marginal_difference(float x) {
  const float e = expf(-fabsf(x)), y = (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -y : y;
}
VSOD_BOTH float log_clipped(float p) { return logf(fminf(fmaxf(p, kClip), 1.0f)); }

// The sum of f(lane) over kLanes threads that are neighbours; only lane 0 may use it.  On the CPU
// lane 0 does what the others would, in the same order.
template <class F>
VSOD_BOTH float sum_of_lanes(int lane, const F& f) {
  static_assert(kLanes == 4, "");
#if defined(__CUDA_ARCH__)
  // The four of a group are there or not there together.
  const unsigned group = 0xfu << (threadIdx.x & 28);
  float x = f(lane);
  x += __shfl_xor_sync(group, x, 1);
  return x + __shfl_xor_sync(group, x, 2);
#else
  return lane == 0 ? (f(0) + f(1)) + (f(2) + f(3)) : 0.0f;
#endif
}

// A product that no compiler fuses with a sum: points on the border of a simplex then have the same
// vertices on the GPU as on the CPU.
VSOD_BOTH float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// ---- building a lattice -------------------------------------------------------------------------

// Weights and keys of the D + 1 vertices around each point: find_simplex() of cpu_kernel.cpp.
template <int D>
struct SimplexKernel {
  Geometry<D> geometry;
  int64_t width, pixels, points;
  const void* image;  // (images, 3, height, width); not read for positions alone
  bool image_is_float;
  float* weights;   // [D + 1][points]
  uint64_t* keys;   // likewise; the image's number is above the bits of a key
  uint32_t* pairs;  // likewise: 0, 1, 2, ...

  int64_t count() const { return points; }

  VSOD_BOTH void operator()(int64_t n) const {
    const int64_t index = n / pixels, pixel = n - index * pixels;
    float features[D];
    features[0] = float(pixel % width), features[1] = float(pixel / width);
    if constexpr (D == 5) {
      VSOD_UNROLL
      for (int c = 0; c < 3; ++c) {
        const int64_t at = (index * 3 + c) * pixels + pixel;
        features[2 + c] = image_is_float ? static_cast<const float*>(image)[at]
                                         : float(static_cast<const uint8_t*>(image)[at]);
      }
    }

    // The hyperplane of coordinates that sum to zero.
    float elevated[D + 1], sum = 0;
    VSOD_UNROLL
    for (int j = D; j > 0; --j) {
      const float f = product(features[j - 1], geometry.scale[j - 1]);
      elevated[j] = sum - product(f, float(j));
      sum += f;
    }
    elevated[0] = sum;

    // The nearest point with coordinates 0 modulo D + 1: base * (D + 1), off the plane by `excess`.
    int base[D + 1], excess = 0;
    float rest[D + 1];
    VSOD_UNROLL
    for (int i = 0; i <= D; ++i) {
      const float y = product(elevated[i], 1.0f / (D + 1)), nearest = rintf(y);
      rest[i] = y - nearest;
      base[i] = int(nearest);
      excess += base[i];
    }

    // rank[i]: how many rests are larger.  The largest ranks take the excess back.
    int rank[D + 1] = {};
    VSOD_UNROLL
    for (int i = 0; i < D; ++i) {
      VSOD_UNROLL
      for (int j = i + 1; j <= D; ++j) {
        const bool less = rest[i] < rest[j];
        rank[i] += less;
        rank[j] += !less;
      }
    }
    VSOD_UNROLL
    for (int i = 0; i <= D; ++i) {
      rank[i] += excess;
      const int off = (rank[i] < 0) - (rank[i] > D);
      rank[i] += off * (D + 1);
      base[i] += off;
      rest[i] -= float(off);
    }

    int64_t key = int64_t(base[1]) * (D + 1) + geometry.origin;
    VSOD_UNROLL
    for (int i = 2; i <= D; ++i)
      key += int64_t(base[i] - base[1]) * (int64_t(1) << geometry.shift[i - 1]);
    key += index << geometry.bits;

    float sorted[D + 1];
    VSOD_UNROLL
    for (int r = 0; r <= D; ++r) {
      const int k = D - r;
      keys[r * points + n] = uint64_t(key);
      pairs[r * points + n] = uint32_t(r * points + n);
      sorted[k] = 0;
      VSOD_UNROLL
      for (int i = 0; i <= D; ++i) {
        const bool mine = rank[i] == k;
        sorted[k] = mine ? rest[i] : sorted[k];
        if (r < D) key += mine ? geometry.step[i] : 0;
      }
    }
    weights[n] = 1.0f + sorted[D] - sorted[0];
    VSOD_UNROLL
    for (int k = 1; k <= D; ++k) weights[k * points + n] = sorted[D - k] - sorted[D - k + 1];
  }
};

// 1 where a sorted key is new: the running sum of it is the vertex of each pair, plus one.
struct HeadKernel {
  int64_t pairs;
  const uint64_t* keys;
  int32_t* heads;

  int64_t count() const { return pairs; }
  VSOD_BOTH void operator()(int64_t i) const { heads[i] = i == 0 || keys[i] != keys[i - 1]; }
};

struct RowKernel {
  int64_t pairs, points;
  const uint64_t* keys;
  const uint32_t* pair;     // sorted with the keys
  const int32_t* vertices;  // of each pair, plus one
  const float* weights;
  uint64_t* vertex_keys;
  uint32_t* rows;
  int32_t* ids;
  Entry* entries;

  int64_t count() const { return pairs; }
  VSOD_BOTH void operator()(int64_t i) const {
    const int32_t v = vertices[i] - 1;
    if (i == 0 || vertices[i - 1] - 1 != v) {
      rows[v] = uint32_t(i);
      vertex_keys[v] = keys[i];
    }
    if (i == pairs - 1) rows[v + 1] = uint32_t(pairs);
    const uint32_t p = pair[i];
    ids[p] = v;
    entries[i] = {int32_t(int64_t(p) % points), weights[p]};
  }
};

// The segments of each list, and empty ones in the slots that are left.
struct SegmentKernel {
  Lattice lattice;
  Segment* segment;

  int64_t count() const { return lattice.vertices; }
  VSOD_BOTH void operator()(int64_t v) const {
    const uint32_t end = lattice.rows[v + 1];
    uint32_t begin = lattice.rows[v];
    const int64_t last =
        v + 1 == lattice.vertices ? lattice.segments : lattice.first_segment(v + 1);
    for (int64_t s = lattice.first_segment(v); s < last; ++s) {
      const uint32_t next = end - begin < uint32_t(kSegment) ? end : begin + kSegment;
      segment[s] = {begin, next};
      begin = next;
    }
  }
};

// The vertex one step up or down along each direction, by binary search in the sorted keys.
template <int D>
struct NeighbourKernel {
  Geometry<D> geometry;
  int64_t vertices;
  const uint64_t* keys;  // of vertices
  int32_t* neighbours;   // [D + 1][2][vertices]

  int64_t count() const { return 2 * (D + 1) * vertices; }
  VSOD_BOTH void operator()(int64_t i) const {
    const int64_t side = i / vertices, v = i - side * vertices;
    int64_t step = 0;
    VSOD_UNROLL
    for (int j = 0; j <= D; ++j) step = side / 2 == j ? geometry.step[j] : step;
    const uint64_t wanted = keys[v] + uint64_t(side % 2 ? -step : step);
    int64_t low = 0, high = vertices;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (keys[middle] < wanted) low = middle + 1;
      else high = middle;
    }
    neighbours[i] = low < vertices && keys[low] == wanted ? int32_t(low) : -1;
  }
};

// ---- filtering ----------------------------------------------------------------------------------

// Values on a lattice: [copies][vertices][channels], and the same of segments.
struct Values {
  float *partial, *a, *b;
};

// The two lattices go through their steps in the same launches; one may be absent, with no points.
struct Filter {
  Lattice gaussian, bilateral;
  Values gaussian_values, bilateral_values;
  int64_t channels;
};

// Sums of the segments: entry weight times what its point has.  With one channel kLanes threads a
// segment; else one thread a channel, so that neighbours read neighbouring channels.
template <bool one_channel>
struct SplatKernel {
  Filter filter;
  const float* values;  // [copies][points][channels], null: ones

  VSOD_BOTH int64_t threads() const { return one_channel ? kLanes : filter.channels; }
  VSOD_BOTH int64_t size(const Lattice& l) const { return l.copies * l.segments * threads(); }
  int64_t count() const { return size(filter.gaussian) + size(filter.bilateral); }

  VSOD_BOTH void operator()(int64_t i) const {
    const int64_t first = size(filter.gaussian);
    if (i < first) splat(filter.gaussian, filter.gaussian_values.partial, i);
    else splat(filter.bilateral, filter.bilateral_values.partial, i - first);
  }

  VSOD_BOTH void splat(const Lattice& lattice, float* partial, int64_t i) const {
    const int64_t to = i / threads(), thread = i - to * threads(), copy = to / lattice.segments;
    const Segment s = lattice.segment[to - copy * lattice.segments];
    if constexpr (one_channel) {
      const float* from = values ? values + copy * lattice.points : nullptr;
      const float sum = sum_of_lanes(int(thread), [&](int lane) {
        float x = 0;
        for (uint32_t e = s.begin + lane; e < s.end; e += kLanes) {
          const Entry entry = lattice.entries[e];
          x += from ? entry.weight * from[entry.point] : entry.weight;
        }
        return x;
      });
      if (thread == 0) partial[to] = sum;
    } else {
      const float* from = values + copy * lattice.points * filter.channels + thread;
      float x = 0;
      for (uint32_t e = s.begin; e < s.end; ++e) {
        const Entry entry = lattice.entries[e];
        x += entry.weight * from[entry.point * filter.channels];
      }
      partial[i] = x;
    }
  }
};

// The value of a vertex: the sum of its segments.
struct GatherKernel {
  Filter filter;

  VSOD_BOTH int64_t size(const Lattice& l) const { return l.copies * l.vertices * filter.channels; }
  int64_t count() const { return size(filter.gaussian) + size(filter.bilateral); }

  VSOD_BOTH void operator()(int64_t i) const {
    const int64_t first = size(filter.gaussian);
    if (i < first) gather(filter.gaussian, filter.gaussian_values, i);
    else gather(filter.bilateral, filter.bilateral_values, i - first);
  }

  VSOD_BOTH void gather(const Lattice& lattice, const Values& values, int64_t i) const {
    const int64_t row = i / filter.channels, channel = i - row * filter.channels;
    const int64_t copy = row / lattice.vertices, v = row - copy * lattice.vertices;
    const float* partial = values.partial +
                           (copy * lattice.segments + lattice.first_segment(v)) * filter.channels +
                           channel;
    const uint32_t length = lattice.rows[v + 1] - lattice.rows[v];
    const uint32_t segments = (length + kSegment - 1) / kSegment;
    float sum = partial[0];
    for (uint32_t s = 1; s < segments; ++s) sum += partial[s * filter.channels];
    values.a[i] = sum;
  }
};

// [1/2 1 1/2] along direction j, from a to b for even j, back for odd ones.
struct BlurKernel {
  Filter filter;
  int j;

  VSOD_BOTH int64_t size(const Lattice& l, int directions) const {
    return j < directions ? l.copies * l.vertices * filter.channels : 0;
  }
  int64_t count() const { return size(filter.gaussian, 3) + size(filter.bilateral, 6); }

  VSOD_BOTH void operator()(int64_t i) const {
    const int64_t first = size(filter.gaussian, 3);
    if (i < first) blur(filter.gaussian, filter.gaussian_values, i);
    else blur(filter.bilateral, filter.bilateral_values, i - first);
  }

  VSOD_BOTH void blur(const Lattice& lattice, const Values& values, int64_t i) const {
    const int64_t row = i / filter.channels, channel = i - row * filter.channels;
    const int64_t copy = row / lattice.vertices, v = row - copy * lattice.vertices;
    const float* from = j & 1 ? values.b : values.a;
    const int32_t* next = lattice.neighbours + 2 * j * lattice.vertices;
    const int64_t start = copy * lattice.vertices;
    float around = 0;
    VSOD_UNROLL
    for (int side = 0; side < 2; ++side) {
      const int32_t u = next[side * lattice.vertices + v];
      if (u >= 0) around += from[(start + u) * filter.channels + channel];
    }
    (j & 1 ? values.a : values.b)[i] = from[i] + 0.5f * around;
  }
};

// The values after all blurs: D + 1 of them.
template <int D>
VSOD_BOTH const float* blurred(const Values& values) {
  return (D + 1) & 1 ? values.b : values.a;
}

// One channel of a point, read back.  `from`: that channel of vertex 0.
template <int D>
VSOD_BOTH float slice(const Lattice& lattice, int64_t point, const float* from, int64_t channels) {
  float sum = 0;
  VSOD_UNROLL
  for (int k = 0; k <= D; ++k) {
    const int64_t pair = k * lattice.points + point;
    sum += lattice.weights[pair] * from[lattice.ids[pair] * channels];
  }
  return sum;
}

// S from the filtered ones.
template <int D>
struct NormKernel {
  Lattice lattice;
  const float* values;  // blurred
  float* norm;

  int64_t count() const { return lattice.points; }
  VSOD_BOTH void operator()(int64_t n) const {
    norm[n] = 1.0f / sqrtf(slice<D>(lattice, n, values, 1) * kAlpha<D> + kTiny);
  }
};

// The splat of S x reads entries with S in them, so that it need not look S up.
struct ScaleKernel {
  int64_t pairs;
  const float* norm;
  Entry* entries;

  int64_t count() const { return pairs; }
  VSOD_BOTH void operator()(int64_t i) const { entries[i].weight *= norm[entries[i].point]; }
};

// ---- mean field ---------------------------------------------------------------------------------

// x = softmax(x)
VSOD_BOTH void softmax(float* x, int64_t channels) {
  float top = x[0], sum = 0;
  for (int64_t c = 1; c < channels; ++c) top = fmaxf(top, x[c]);
  for (int64_t c = 0; c < channels; ++c) {
    x[c] = expf(x[c] - top);
    sum += x[c];
  }
  const float scale = 1.0f / sum;
  for (int64_t c = 0; c < channels; ++c) x[c] *= scale;
}

// Logits of the unary, and Q_0.
struct StartKernel {
  int64_t pixels, points, classes;  // classes: 0 for a foreground probability
  const float* prob;
  float* logits;  // [points] log(p_1 / p_0), or [points][classes] log p
  float* q;       // likewise: z, or the marginals

  int64_t count() const { return points; }
  VSOD_BOTH void operator()(int64_t n) const {
    if (classes == 0) {
      const float p = prob[n];
      logits[n] = log_clipped(p) - log_clipped(1.0f - p);
      q[n] = marginal_difference(logits[n]);
      return;
    }
    const int64_t index = n / pixels, pixel = n - index * pixels;
    for (int64_t c = 0; c < classes; ++c) {
      const float x = log_clipped(prob[(index * classes + c) * pixels + pixel]);
      logits[n * classes + c] = x;
      q[n * classes + c] = x;
    }
    softmax(q + n * classes, classes);
  }
};

// Slice of both lattices, the new marginals, and the output after the last iteration.
struct UpdateKernel {
  Filter filter;
  int64_t pixels, points, classes;
  float gaussian_weight, bilateral_weight;
  const float* logits;
  float* q;
  float* out;  // shaped like prob; null before the last iteration

  int64_t count() const { return points; }

  VSOD_BOTH void operator()(int64_t n) const {
    const int64_t index = n / pixels, pixel = n - index * pixels, channels = filter.channels;
    const Lattice &g = filter.gaussian, &b = filter.bilateral;
    float g_scale = 0, b_scale = 0;
    if (g.points) g_scale = g.norm[pixel] * (gaussian_weight * kAlpha<2>);
    if (b.points) b_scale = b.norm[n] * (bilateral_weight * kAlpha<5>);
    const float* g_values = blurred<2>(filter.gaussian_values) + index * g.vertices * channels;
    const float* b_values = blurred<5>(filter.bilateral_values);
    const auto logit = [&](int64_t c) {
      float x = logits[n * channels + c];
      if (g.points) x += slice<2>(g, pixel, g_values + c, channels) * g_scale;
      if (b.points) x += slice<5>(b, n, b_values + c, channels) * b_scale;
      return x;
    };
    if (classes == 0) {
      const float x = logit(0);
      if (out) out[n] = sigmoid(x);
      else q[n] = marginal_difference(x);
      return;
    }
    float* mine = q + n * channels;
    for (int64_t c = 0; c < classes; ++c) mine[c] = logit(c);
    softmax(mine, classes);
    if (out)
      for (int64_t c = 0; c < classes; ++c) out[(index * classes + c) * pixels + pixel] = mine[c];
  }
};

}  // namespace dense_crf_cuda
}  // namespace vsod
