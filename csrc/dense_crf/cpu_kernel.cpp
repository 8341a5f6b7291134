// Mean field of a fully connected CRF on a CPU, for one SIMD level.
//
// What.  Q = softmax(-U + sum_k weight_k * S_k K_k S_k Q), iterated, for a Gaussian kernel K over
// positions (2-D) and one over positions and colours (5-D); U = -log(clip(prob)), S_k diagonal.
//
// How.  K is applied on the permutohedral lattice (Adams, Baek, Davis 2010): a point of the D-D
// feature space lies in a simplex with D + 1 vertices; its value is spread over them by
// barycentric weights (splat), the vertices are blurred with [1/2 1 1/2] along the D + 1
// directions of the lattice, and each point reads its vertices back (slice).
//
// A lattice is made once per image (the 2-D one once per call) and kept:
//     ids, weights  [block of kLanes points][D + 1][kLanes] each, side by side: the vertices of
//                   each point
//     next, last    [D + 1][vertices]: neighbours; a missing one is the vertex `vertices`, whose
//                   value is 0
// A vertex is packed into one 64-bit key by a linear map, so that its neighbour along direction j
// is key + step[j], and a simplex is walked by adding steps.  All keys go through a shared hash
// table (linear probing, compare-and-swap), are then sorted, and a vertex is its rank: the same
// numbers whichever thread came first, and the neighbours of all vertices along j come from
// walking two sorted lists, with no look-ups.
//
// An iteration reads ids and weights just once: slice, softmax and the splat of the next
// iteration are one pass over the points.  Two classes need one channel, z = Q_1 - Q_0, since the
// filter is linear: z' = tanh((log p_1/p_0 + sum_k weight_k (S_k K_k S_k z)) / 2).
//
// Why the bits are always the same.  Sums are over fixed chunks of points (their number depends on
// the problem alone), each into vertices of its own, added up in order; everything else is one
// value from fixed inputs.  So threads may take tasks in any order.

#include "cpu.h"

#if !defined(__AVX512BF16__)  // no bfloat16 arithmetic here: that level takes avx512's kernel

#include <sched.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <new>

#include "../common/scratch.h"
#include "../common/simd.h"
#include "geometry.h"

namespace vsod {
namespace VSOD_LEVEL {

using namespace dense_crf;

namespace {

constexpr int kTasks = 32;                // tasks of one phase; also the most chunks of points
constexpr int kMaxGrowths = 16;           // of the hash table, each by 4
constexpr int64_t kSmallImage = 1 << 16;  // pixels
constexpr float kClip = 1e-5f;
constexpr float kTiny = 1e-20f;

struct Range {
  int64_t begin, end;
};
VSOD_INLINE Range part(int64_t count, int64_t index, int64_t parts) {
  return {count * index / parts, count * (index + 1) / parts};
}

// ------------------------------------------------------------------ threads

// One step that threads share.  It starts out as zeros.
struct alignas(64) Phase {
  int64_t next;
  alignas(64) int64_t done;
  int64_t flag;  // set by a task for those who come after: most say how much memory is missing
};

// One thread's way through the phases.  Any number of threads can walk the same phases, also one
// that arrives when all is done: it finds no tasks.  So the numbers of phases and tasks must not
// depend on what a later phase may change.
class Walk {
 public:
  explicit Walk(Phase* first) : phase_(first) {}

  // f(i, flag) for i = 0..kTasks-1, each once over all threads; returns the flag when all are done.
  template <class F>
  VSOD_INLINE int64_t tasks(F f) {
    return run(kTasks, f);
  }
  // f(0, flag) on one thread.
  template <class F>
  VSOD_INLINE int64_t once(F f) {
    return run(1, f);
  }
  template <class F>
  VSOD_INLINE int64_t run(int64_t count, F f) {
    Phase& phase = *phase_++;
    for (int64_t i; (i = __atomic_fetch_add(&phase.next, 1, __ATOMIC_RELAXED)) < count;) {
      f(i, &phase.flag);
      __atomic_fetch_add(&phase.done, 1, __ATOMIC_RELEASE);
    }
    for (int spins = 0; __atomic_load_n(&phase.done, __ATOMIC_ACQUIRE) < count; ++spins)
      if (spins > 200) sched_yield();
    return __atomic_load_n(&phase.flag, __ATOMIC_RELAXED);
  }

 private:
  Phase* phase_;
};

// Zero leaves a flag as it is.
VSOD_INLINE void raise_flag(int64_t* flag, int64_t value = 1) {
  if (value) __atomic_store_n(flag, value, __ATOMIC_RELAXED);
}

// ------------------------------------------------------------------ memory

// An array.  Large ones are mappings of their own, so that release() gives them back at once, in
// large pages where there are any: fewer faults at the first touch, and the random reads of a
// filter do not run out of address translations.
template <class T>
struct Buffer {
  T* data = nullptr;

  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }

  // Room for `count` elements; what was there before is lost.  Returns 0, or the bytes that there
  // is no memory for.
  int64_t reserve(int64_t count) { return count <= count_ ? 0 : fresh(count); }

  // The same, and all zeros.
  int64_t zeros(int64_t count) {
    const int64_t missing = fresh(count);
    // A new mapping is zeros.
    if (!missing && !mapped()) memset(static_cast<void*>(data), 0, size_t(count) * sizeof(T));
    return missing;
  }

  void release() {
    if (mapped()) munmap(static_cast<void*>(data), bytes());
    else free(static_cast<void*>(data));
    data = nullptr, count_ = 0;
  }

 private:
  static constexpr size_t kLarge = size_t(1) << 20, kPage = size_t(1) << 21;

  int64_t fresh(int64_t count) {
    release();
    count_ = count;
    const int64_t wanted = int64_t(bytes());
    void* p = nullptr;
    if (!mapped()) {
      if (posix_memalign(&p, 64, bytes()) != 0) p = nullptr;
    } else {
      // A large page more, to cut a start out that is on the boundary of one.
      const size_t size = bytes();
      p = mmap(nullptr, size + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (p == MAP_FAILED) {
        p = nullptr;
      } else {
        char* start = static_cast<char*>(p);
        const size_t before = size_t(-reinterpret_cast<uintptr_t>(start)) & (kPage - 1);
        if (before) munmap(start, before);
        if (kPage > before) munmap(start + before + size, kPage - before);
        p = start + before;
#if defined(MADV_HUGEPAGE)
        madvise(p, size, MADV_HUGEPAGE);
#endif
      }
    }
    data = static_cast<T*>(p);
    if (data) return 0;
    count_ = 0;
    return wanted;
  }

  bool mapped() const { return bytes() >= kLarge; }
  // Whole large pages: the tails of all arrays together would be thousands of small ones.
  size_t bytes() const {
    const size_t size = size_t(count_) * sizeof(T), page = size < kLarge ? 4096 : kPage;
    return (size + page - 1) & ~(page - 1);
  }

  int64_t count_ = 0;
};

// ------------------------------------------------------------------ vectors

VSOD_INLINE Vec<float> gather(const float* base, Vec<int32_t> index) {
#if defined(__AVX512F__)
  return Vec<float>(_mm512_i32gather_ps(__m512i(index), base, 4));
#elif defined(__AVX2__)
  return Vec<float>(_mm256_i32gather_ps(base, __m256i(index), 4));
#else
  Vec<float> v = {};
  for (int i = 0; i < kLanes<float>; ++i) v[i] = base[index[i]];
  return v;
#endif
}

VSOD_INLINE Vec<float> load_pixels(const uint8_t* p) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes<float>)));
  Bytes bytes;
  memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(bytes, Vec<float>);
}
VSOD_INLINE Vec<float> load_pixels(const float* p) { return load(p); }

VSOD_INLINE Vec<float> to_nearest(Vec<float> x) {  // |x| < 2^22
  const Vec<float> magic = broadcast(12582912.0f);
  return (x + magic) - magic;
}

VSOD_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  return exp2_nonpositive<5>(x * 1.44269504f);
}

// log(x) for normal x > 0: x = 2^e * m with m in [sqrt(1/2), sqrt(2)), log m by its atanh series.
VSOD_INLINE Vec<float> log_positive(Vec<float> x) {
  const Vec<int32_t> bits = Vec<int32_t>(x);
  const Vec<int32_t> exponent = (bits - 0x3f3504f3) >> 23;
  const Vec<float> m = Vec<float>(bits - (exponent << 23));
  const Vec<float> t = (m - 1.0f) / (m + 1.0f), t2 = t * t;
  const Vec<float> series =
      (((t2 * (2.0f / 9) + 2.0f / 7) * t2 + 2.0f / 5) * t2 + 2.0f / 3) * t2 + 2.0f;
  return __builtin_convertvector(exponent, Vec<float>) * 0.69314718f + t * series;
}

// Q_1 - Q_0 = sigmoid(x) - sigmoid(-x) = tanh(x / 2) of the logit x.
VSOD_INLINE Vec<float> marginal_difference(Vec<float> x) {
  const Vec<float> e = exp_nonpositive(-absolute(x));
  const Vec<float> y = (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -y : y;
}
VSOD_INLINE Vec<float> sigmoid(Vec<float> x) {
  const Vec<float> e = exp_nonpositive(-absolute(x));
  const Vec<float> y = 1.0f / (1.0f + e);
  return x < 0.0f ? e * y : y;
}

// ------------------------------------------------------------------ geometry

typedef int64_t WideInt __attribute__((vector_size(2 * kVectorBytes)));

// The D + 1 vertices around each of kLanes points: weights and keys, both [D + 1][kLanes].
template <int D>
VSOD_INLINE void find_simplex(const Geometry<D>& geometry, const Vec<float>* features,
                              float* weights, uint64_t* keys) {
  // The hyperplane of coordinates that sum to zero.
  Vec<float> elevated[D + 1], sum = {};
#pragma GCC unroll 8
  for (int j = D; j > 0; --j) {
    const Vec<float> f = features[j - 1] * geometry.scale[j - 1];
    elevated[j] = sum - f * float(j);
    sum += f;
  }
  elevated[0] = sum;

  // The nearest point with coordinates 0 modulo D + 1: base * (D + 1), off the plane by `excess`.
  Vec<int32_t> base[D + 1], excess = {};
  Vec<float> rest[D + 1];
#pragma GCC unroll 8
  for (int i = 0; i <= D; ++i) {
    const Vec<float> y = elevated[i] * (1.0f / (D + 1));
    const Vec<float> nearest = to_nearest(y);
    rest[i] = y - nearest;
    base[i] = __builtin_convertvector(nearest, Vec<int32_t>);
    excess += base[i];
  }

  // rank[i]: how many rests are larger.  The largest ranks take the excess back.
  Vec<int32_t> rank[D + 1] = {};
#pragma GCC unroll 8
  for (int i = 0; i < D; ++i)
#pragma GCC unroll 8
    for (int j = i + 1; j <= D; ++j) {
      const Vec<int32_t> less = rest[i] < rest[j];  // -1 where true
      rank[i] -= less;
      rank[j] += less + 1;
    }
#pragma GCC unroll 8
  for (int i = 0; i <= D; ++i) {
    rank[i] += excess;
    const Vec<int32_t> below = rank[i]<0, above = rank[i]> D;
    rank[i] += (below & (D + 1)) - (above & (D + 1));
    base[i] += above - below;
    rest[i] += __builtin_convertvector(below - above, Vec<float>);
  }

  WideInt key = __builtin_convertvector(base[1] * (D + 1), WideInt) + geometry.origin;
#pragma GCC unroll 8
  for (int i = 2; i <= D; ++i)
    key += __builtin_convertvector(base[i] - base[1], WideInt) << geometry.shift[i - 1];

  Vec<float> sorted[D + 1];
#pragma GCC unroll 8
  for (int r = 0; r <= D; ++r) {
    const int k = D - r;
    memcpy(keys + (r * kLanes<float>), &key, sizeof(key));
    sorted[k] = Vec<float>{};
#pragma GCC unroll 8
    for (int i = 0; i <= D; ++i) {
      const Vec<int32_t> mine = rank[i] == k;
      sorted[k] = mine ? rest[i] : sorted[k];
      if (r < D) key += __builtin_convertvector(mine, WideInt) & geometry.step[i];
    }
  }
  store(weights, 1.0f + sorted[D] - sorted[0]);
#pragma GCC unroll 8
  for (int k = 1; k <= D; ++k)
    store(weights + k * kLanes<float>, sorted[D - k] - sorted[D - k + 1]);
}

// ------------------------------------------------------------------ hash table

// Keys are kept plus one: zero is an empty slot.  Once the keys are sorted, a slot holds the rank
// of its key.
struct Table {
  Buffer<uint64_t> keys;
  int64_t capacity = 0;  // a power of two
  int64_t used = 0;
  int shift = 0;

  static constexpr int64_t kMostSlots = int64_t(1) << 31;

  int64_t resize(int64_t at_least) {
    capacity = 16, shift = 60;
    while (capacity < at_least) capacity *= 2, --shift;
    used = 0;
    return capacity <= kMostSlots ? keys.zeros(capacity) : capacity * int64_t(sizeof(uint64_t));
  }

  VSOD_INLINE int64_t home(uint64_t stored) const {
    return int64_t((stored * 0x9e3779b97f4a7c15u) >> shift);
  }

  // The slot of a key, put there if need be; -1 if the table is full.
  VSOD_INLINE int64_t put(uint64_t stored, int64_t slot, int64_t* added) {
    for (int64_t probes = 0; probes < capacity; ++probes) {
      uint64_t* at = keys.data + slot;
      uint64_t found = __atomic_load_n(at, __ATOMIC_RELAXED);
      if (found == stored) return slot;
      if (found == 0) {
        if (__atomic_compare_exchange_n(at, &found, stored, false, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED)) {
          ++*added;
          return slot;
        }
        if (found == stored) return slot;
      }
      slot = (slot + 1) & (capacity - 1);
    }
    return -1;
  }
};

struct Entry {
  uint64_t key;
  int32_t slot;
};

// Sorts by key, of which `bits` bits count, through `spare`; returns where the result is.
Entry* sort_entries(Entry* entries, Entry* spare, int64_t count, int bits) {
  constexpr int kDigit = 11;
  for (int shift = 0; shift < bits; shift += kDigit) {
    int64_t start[1 << kDigit] = {};
    for (int64_t i = 0; i < count; ++i) ++start[(entries[i].key >> shift) & ((1 << kDigit) - 1)];
    int64_t sum = 0;
    for (int64_t& n : start) {
      const int64_t mine = n;
      n = sum;
      sum += mine;
    }
    for (int64_t i = 0; i < count; ++i)
      spare[start[(entries[i].key >> shift) & ((1 << kDigit) - 1)]++] = entries[i];
    Entry* other = entries;
    entries = spare;
    spare = other;
  }
  return entries;
}

// ------------------------------------------------------------------ lattice

// The values on the vertices of one lattice: [vertices + 1][channels], and for each chunk of
// points a copy of its own that the splat adds to.
struct Values {
  Buffer<float> a, b, sums;

  void release() {
    a.release();
    b.release();
    sums.release();
  }

  int64_t reserve(int64_t vertices, int64_t channels, int64_t chunks) {
    const int64_t padded = (vertices + 1) * channels + kLanes<float>;
    int64_t missing = a.reserve(padded);
    if (!missing) missing = b.reserve(padded);
    if (!missing) missing = sums.reserve(vertices * channels * chunks);
    if (missing) return missing;
    a.data[vertices] = b.data[vertices] = 0;  // the norm is filtered with one channel
    memset(a.data + vertices * channels, 0, size_t(channels) * 4);
    memset(b.data + vertices * channels, 0, size_t(channels) * 4);
    return 0;
  }
};

template <int D>
struct Lattice {
  static constexpr int kBlock = (D + 1) * kLanes<float>;  // ids or weights of a block of points

  const Geometry<D>* geometry;
  int64_t points, blocks, vertices = 0;
  int64_t capacity = 0;        // first size of the table
  Buffer<char> corners;        // [blocks]: int32 ids [D + 1][kLanes], float weights likewise
  Buffer<int32_t> neighbours;  // [2][D + 1][vertices]: next, last
  Buffer<float> norm;          // [points], the diagonal of S
  Table table;
  Buffer<Entry> entries, spare;
  Entry* sorted = nullptr;
  int64_t counts[kTasks];

  // What turns slice(blur(splat(1))) into K 1.
  static constexpr float kAlpha = 1.0f / (1.0f + 1.0f / (1 << D));

  VSOD_INLINE int32_t* ids(int64_t block) const {
    return reinterpret_cast<int32_t*>(corners.data + block * kBlock * 8);
  }
  VSOD_INLINE float* weights(int64_t block) const {
    return reinterpret_cast<float*>(corners.data + block * kBlock * 8 + kBlock * 4);
  }
  VSOD_INLINE int32_t* next(int j) const { return neighbours.data + j * vertices; }
  VSOD_INLINE int32_t* last(int j) const { return neighbours.data + (D + 1 + j) * vertices; }

  // features(block, out) gives the D features of kLanes points.  Returns 0, or the bytes that there
  // is no memory for.
  template <class Features>
  int64_t build(Walk& walk, Features features) {
    if (const int64_t missing = hash(walk, features)) return missing;
    if (const int64_t missing = rank(walk)) return missing;
    walk.tasks([&](int64_t task, int64_t*) { link(task); });
    walk.once([&](int64_t, int64_t*) {
      entries.release();
      spare.release();
    });
    return 0;
  }

  // All keys into the table, which grows until they fit; ids are slots of it.
  template <class Features>
  int64_t hash(Walk& walk, Features features) {
    if (const int64_t missing = walk.once([&](int64_t, int64_t* flag) {
          raise_flag(flag, corners.reserve(blocks * kBlock * 8));
          raise_flag(flag, norm.reserve(blocks * kLanes<float>));
          raise_flag(flag, table.resize(capacity));
        }))
      return missing;
    while (walk.tasks([&](int64_t task, int64_t* full) { insert(task, full, features); }))
      if (const int64_t missing = walk.once(
              [&](int64_t, int64_t* flag) { raise_flag(flag, table.resize(table.capacity * 4)); }))
        return missing;
    return 0;
  }

  // Sorts the keys: there are `vertices` of them, and each slot of the table gets the rank of its
  // key.
  int64_t rank(Walk& walk) {
    walk.tasks([&](int64_t task, int64_t*) {
      const Range r = part(table.capacity, task, kTasks);
      int64_t count = 0;
      for (int64_t i = r.begin; i < r.end; ++i) count += table.keys.data[i] != 0;
      counts[task] = count;
    });
    if (const int64_t missing = walk.once([&](int64_t, int64_t* flag) {
          vertices = 0;
          for (int64_t& count : counts) {
            const int64_t mine = count;
            count = vertices;
            vertices += mine;
          }
          raise_flag(flag, entries.reserve(vertices));
          raise_flag(flag, spare.reserve(vertices));
        }))
      return missing;
    walk.tasks([&](int64_t task, int64_t*) {
      const Range r = part(table.capacity, task, kTasks);
      Entry* to = entries.data + counts[task];
      for (int64_t i = r.begin; i < r.end; ++i)
        if (table.keys.data[i]) *to++ = {table.keys.data[i] - 1, int32_t(i)};
    });
    if (const int64_t missing = walk.once([&](int64_t, int64_t* flag) {
          sorted = sort_entries(entries.data, spare.data, vertices, geometry->bits);
          (sorted == entries.data ? spare : entries).release();
          raise_flag(flag, neighbours.reserve(2 * (D + 1) * vertices));
        }))
      return missing;
    walk.tasks([&](int64_t task, int64_t*) {
      const Range r = part(vertices, task, kTasks);
      for (int64_t i = r.begin; i < r.end; ++i) table.keys.data[sorted[i].slot] = uint64_t(i);
      for (int j = 0; j <= D; ++j)
        for (int64_t i = r.begin; i < r.end; ++i) last(j)[i] = int32_t(vertices);
    });
    return 0;
  }

  template <class Features>
  void insert(int64_t task, int64_t* full, Features features) {
    const Range r = part(blocks, task, kTasks);
    const int64_t limit = table.capacity / 8 * 5;
    for (int64_t block = r.begin; block < r.end; ++block) {
      if (__atomic_load_n(full, __ATOMIC_RELAXED)) return;
      Vec<float> f[D];
      features(block, f);
      uint64_t keys[kBlock];
      int64_t home[kBlock];
      float* w = weights(block);
      find_simplex<D>(*geometry, f, w, keys);
      for (int64_t n = points - block * kLanes<float>; n < kLanes<float>; ++n)
        for (int k = 0; k <= D; ++k) {  // points that are not there
          keys[k * kLanes<float> + n] = keys[k * kLanes<float>];
          w[k * kLanes<float> + n] = 0;
        }
      for (int i = 0; i < kBlock; ++i) home[i] = table.home(++keys[i]);
      int32_t* to = ids(block);
      int64_t added = 0;
      for (int i = 0; i < kBlock; ++i) {
        int64_t slot = home[i];
        const uint64_t found = __atomic_load_n(table.keys.data + slot, __ATOMIC_RELAXED);
        if (__builtin_expect(found != keys[i], 0)) {
          slot = table.put(keys[i], slot, &added);
          if (slot < 0) return raise_flag(full);
        }
        to[i] = int32_t(slot);
      }
      if (added && __atomic_fetch_add(&table.used, added, __ATOMIC_RELAXED) + added > limit)
        return raise_flag(full);
    }
  }

  // Neighbours: as v rises so does key(v) + step, so one walk up the sorted keys finds them all.
  void link(int64_t task) {
    const Range r = part(vertices, task, kTasks);
    if (r.begin == r.end) return;
    for (int j = 0; j <= D; ++j) {
      const uint64_t step = uint64_t(geometry->step[j]);
      int64_t low = 0, high = vertices;  // the first key that is not below the first one wanted
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (sorted[middle].key < sorted[r.begin].key + step) low = middle + 1;
        else high = middle;
      }
      for (int64_t v = r.begin, u = low; v < r.end; ++v) {
        const uint64_t wanted = sorted[v].key + step;
        while (u < vertices && sorted[u].key < wanted) ++u;
        const bool there = u < vertices && sorted[u].key == wanted;
        next(j)[v] = int32_t(there ? u : vertices);
        if (there) last(j)[u] = int32_t(v);
      }
    }
  }

  // ---------------------------------------------------------------- one channel

  VSOD_INLINE Vec<float> slice(int64_t block, const float* values) const {
    const int32_t* id = ids(block);
    const float* w = weights(block);
    Vec<float> sum = {};
#pragma GCC unroll 8
    for (int k = 0; k <= D; ++k)
      sum += load(w + k * kLanes<float>) * gather(values, load(id + k * kLanes<float>));
    return sum;
  }

  VSOD_INLINE void splat(int64_t block, Vec<float> x, float* sums) const {
    const int32_t* id = ids(block);
    const float* w = weights(block);
    float share[kBlock];
#pragma GCC unroll 8
    for (int k = 0; k <= D; ++k) store(share + k * kLanes<float>, load(w + k * kLanes<float>) * x);
    for (int lane = 0; lane < kLanes<float>; ++lane)  // k inside: D + 1 chains of additions
#pragma GCC unroll 8
      for (int k = 0; k <= D; ++k)
        sums[id[k * kLanes<float> + lane]] += share[k * kLanes<float> + lane];
  }

  // From slots of the table to vertices, and the splat of ones.
  void renumber(int64_t task, int64_t chunks, Values& values) {
    if (task >= chunks) return;
    float* sums = values.sums.data + task * vertices;
    memset(sums, 0, size_t(vertices) * 4);
    const Range r = part(blocks, task, chunks);
    for (int64_t block = r.begin; block < r.end; ++block) {
      int32_t* id = ids(block);
      for (int i = 0; i < kBlock; ++i) id[i] = int32_t(table.keys.data[id[i]]);
      splat(block, broadcast(1.0f), sums);
    }
  }

  void reduce(int64_t task, int64_t chunks, int64_t channels, Values& values) const {
    const int64_t numbers = vertices * channels;
    const Range r = part(numbers, task, kTasks);
    float* to = values.a.data;
    const float* from = values.sums.data;
    int64_t i = r.begin;
    for (; i + kLanes<float> <= r.end; i += kLanes<float>) {
      Vec<float> sum = load(from + i);
      for (int64_t c = 1; c < chunks; ++c) sum += load(from + c * numbers + i);
      store(to + i, sum);
    }
    for (; i < r.end; ++i) {
      float sum = from[i];
      for (int64_t c = 1; c < chunks; ++c) sum += from[c * numbers + i];
      to[i] = sum;
    }
  }

  void blur(int64_t task, int j, Values& values) const {
    const Range r = part(vertices, task, kTasks);
    const float* from = j & 1 ? values.b.data : values.a.data;
    float* to = j & 1 ? values.a.data : values.b.data;
    const int32_t *n = next(j), *l = last(j);
    int64_t i = r.begin;
    for (; i + kLanes<float> <= r.end; i += kLanes<float>)
      store(to + i,
            load(from + i) + 0.5f * (gather(from, load(n + i)) + gather(from, load(l + i))));
    for (; i < r.end; ++i) to[i] = from[i] + 0.5f * (from[n[i]] + from[l[i]]);
  }

  static float* blurred(Values& values) { return (D + 1) & 1 ? values.b.data : values.a.data; }

  VSOD_INLINE void set_norm(int64_t block, const float* values) {
    const Vec<float> sum = slice(block, values) * kAlpha + kTiny;
    Vec<float> root;
    for (int i = 0; i < kLanes<float>; ++i) root[i] = __builtin_sqrtf(sum[i]);
    store(norm.data + block * kLanes<float>, 1.0f / root);
  }

  // ---------------------------------------------------------------- many channels

  // sum[c] += scale * slice of point (block, lane)
  VSOD_INLINE void slice_add(int64_t block, int lane, const float* values, int64_t channels,
                             float scale, float* sum) const {
    const int32_t* id = ids(block) + lane;
    const float* w = weights(block) + lane;
    for (int64_t c = 0; c < channels; c += kLanes<float>) {
      Vec<float> s = {};
#pragma GCC unroll 8
      for (int k = 0; k <= D; ++k)
        s += load(values + id[k * kLanes<float>] * channels + c) * w[k * kLanes<float>];
      store(sum + c, load(sum + c) + s * scale);
    }
  }

  VSOD_INLINE void splat_add(int64_t block, int lane, const float* x, int64_t channels, float scale,
                             float* sums) const {
    const int32_t* id = ids(block) + lane;
    const float* w = weights(block) + lane;
    for (int k = 0; k <= D; ++k) {
      float* to = sums + id[k * kLanes<float>] * channels;
      const float share = scale * w[k * kLanes<float>];
      for (int64_t c = 0; c < channels; c += kLanes<float>)
        store(to + c, load(to + c) + load(x + c) * share);
    }
  }

  void blur_channels(int64_t task, int j, int64_t channels, Values& values) const {
    const Range r = part(vertices, task, kTasks);
    const float* from = j & 1 ? values.b.data : values.a.data;
    float* to = j & 1 ? values.a.data : values.b.data;
    for (int64_t i = r.begin; i < r.end; ++i) {
      const float* n = from + next(j)[i] * channels;
      const float* l = from + last(j)[i] * channels;
      for (int64_t c = 0; c < channels; c += kLanes<float>)
        store(to + i * channels + c,
              load(from + i * channels + c) + 0.5f * (load(n + c) + load(l + c)));
    }
  }
};

// ------------------------------------------------------------------ mean field

// Chunks of points: many enough for the threads, few enough that their copies of the vertices
// are small beside the points.
int64_t chunk_count(int64_t points, int64_t vertices, int64_t channels) {
  const int64_t most = channels == 1 ? kTasks : 8;
  return smaller(larger(smaller(2 * points / larger(vertices, 1), most), 4), points / 512 + 1);
}

VSOD_INLINE Vec<float> clipped(Vec<float> p) {
  p = p < kClip ? broadcast(kClip) : p;
  return p > 1.0f ? broadcast(1.0f) : p;
}

// One image's memory.
struct Work {
  Lattice<5> bilateral;
  Values gaussian_values, bilateral_values;
  Buffer<float> logits;  // [points] log(p_1 / p_0), or [points][channels] log p
  Buffer<float> rows;    // [kTasks][channels], the marginals of one point
  int64_t chunks = 1;
};

struct Run {
  const Problem& p;
  const Geometry<2> gaussian_geometry;
  const Geometry<5> bilateral_geometry;
  const bool use_gaussian, use_bilateral;
  const int64_t points, blocks, channels;
  const int64_t phases;  // of one walk, at most
  // Small images go to one thread each while there are as many as threads.  The others go to all
  // threads together, one after another, so that there is the memory of one lattice only.
  const int64_t shared_images, own_images;
  Lattice<2> gaussian;
  Values norm_values;
  Buffer<Phase> phase;  // [2 + threads + shared_images][phases]
  Work* work;           // one a thread
  int64_t arrived = 0;
  int64_t missing = 0;  // bytes that there is no memory for

  explicit Run(const Problem& problem)
      : p(problem), gaussian_geometry(problem.height, problem.width, problem.gaussian_sxy, 0),
        bilateral_geometry(problem.height, problem.width, problem.bilateral_sxy,
                           problem.bilateral_srgb),
        use_gaussian(problem.gaussian_weight > 0), use_bilateral(problem.bilateral_weight > 0),
        points(problem.height * problem.width),
        blocks((points + kLanes<float> - 1) / kLanes<float>),
        channels(problem.classes ? round_up(problem.classes, kLanes<float>) : 1),
        phases(64 + 2 * kMaxGrowths + 8 * problem.iterations),
        shared_images(points < kSmallImage ? problem.batch % problem.threads : problem.batch),
        own_images(problem.batch - shared_images),
        work(new (std::nothrow) Work[size_t(problem.threads)]) {
    prepare(gaussian, gaussian_geometry, points / 2);
    missing = work ? phase.zeros((2 + p.threads + shared_images) * phases)
                   : problem.threads * int64_t(sizeof(Work));
  }
  ~Run() { delete[] work; }

  template <int D>
  void prepare(Lattice<D>& lattice, const Geometry<D>& geometry, int64_t capacity) const {
    lattice.geometry = &geometry;
    lattice.points = points;
    lattice.blocks = blocks;
    // A table that grew for the image before stays as it is.
    lattice.capacity = larger(p.hash_capacity ? p.hash_capacity : capacity, lattice.table.capacity);
  }

  VSOD_INLINE void positions(int64_t block, Vec<float>* f) const {
    const int64_t first = block * kLanes<float>;
    float x = float(first % p.width), y = float(first / p.width);
    const float width = float(p.width);
    for (int i = 0; i < kLanes<float>; ++i) {
      f[0][i] = x, f[1][i] = y;
      x += 1;
      if (x == width) x = 0, y += 1;
    }
  }

  template <class Pixel>
  VSOD_INLINE void colours(int64_t block, const Pixel* image, Vec<float>* f) const {
    const int64_t first = block * kLanes<float>;
    for (int c = 0; c < 3; ++c) {
      const Pixel* plane = image + c * points + first;
      if (first + kLanes<float> <= points) {
        f[c] = load_pixels(plane);
      } else {
        f[c] = Vec<float>{};
        for (int64_t i = 0; first + i < points; ++i) f[c][i] = float(plane[i]);
      }
    }
  }

  // Filters ones and makes the norm of it: after build(), ids are slots of the table until then.
  template <int D>
  void normalise(Walk& walk, Lattice<D>& lattice, Values& values, const int64_t& chunks) {
    walk.tasks([&](int64_t task, int64_t*) { lattice.renumber(task, chunks, values); });
    walk.once([&](int64_t, int64_t*) { lattice.table.keys.release(); });
    walk.tasks([&](int64_t task, int64_t*) { lattice.reduce(task, chunks, 1, values); });
    for (int j = 0; j <= D; ++j)
      walk.tasks([&](int64_t task, int64_t*) { lattice.blur(task, j, values); });
  }

  // The lattice of positions is the same for every image of the call.  Like image() it returns 0,
  // or the bytes that there is no memory for.
  int64_t start(Walk& walk) {
    if (!use_gaussian) return 0;
    const auto features = [&](int64_t block, Vec<float>* f) { positions(block, f); };
    if (const int64_t bytes = gaussian.build(walk, features)) return bytes;
    static constexpr int64_t kChunks = 8;
    if (const int64_t bytes = walk.once([&](int64_t, int64_t* flag) {
          raise_flag(flag, norm_values.reserve(gaussian.vertices, 1, kChunks));
        }))
      return bytes;
    normalise(walk, gaussian, norm_values, kChunks);
    walk.tasks([&](int64_t task, int64_t*) {
      const Range r = part(blocks, task, kTasks);
      for (int64_t block = r.begin; block < r.end; ++block)
        gaussian.set_norm(block, Lattice<2>::blurred(norm_values));
    });
    walk.once([&](int64_t, int64_t*) { norm_values.release(); });
    return 0;
  }

  int64_t image(Walk& walk, Work& w, int64_t index) {
    if (const int64_t bytes = build(walk, w, index)) return bytes;
    if (use_bilateral) normalise(walk, w.bilateral, w.bilateral_values, w.chunks);
    walk.tasks([&](int64_t task, int64_t*) { first_pass(task, w, index); });
    iterate(walk, w, index);
    return 0;
  }

  // The lattice of the image, and room for what is filtered on both.
  int64_t build(Walk& walk, Work& w, int64_t index) {
    const int64_t pixels = index * 3 * points;
    if (const int64_t bytes = walk.once([&](int64_t, int64_t* flag) {
          prepare(w.bilateral, bilateral_geometry, points);
          raise_flag(flag, w.logits.reserve(blocks * kLanes<float> * channels));
          raise_flag(flag, w.rows.reserve(kTasks * channels));
        }))
      return bytes;
    if (use_bilateral) {
      const auto features = [&](int64_t block, Vec<float>* f) {
        positions(block, f);
        if (p.image_is_float) colours(block, static_cast<const float*>(p.image) + pixels, f + 2);
        else colours(block, static_cast<const uint8_t*>(p.image) + pixels, f + 2);
      };
      if (const int64_t bytes = w.bilateral.build(walk, features)) return bytes;
    }
    return walk.once([&](int64_t, int64_t* flag) {
      w.chunks = chunk_count(
          points,
          larger(use_bilateral ? w.bilateral.vertices : 0, use_gaussian ? gaussian.vertices : 0),
          channels);
      if (use_bilateral)
        raise_flag(flag, w.bilateral_values.reserve(w.bilateral.vertices, channels, w.chunks));
      if (use_gaussian)
        raise_flag(flag, w.gaussian_values.reserve(gaussian.vertices, channels, w.chunks));
    });
  }

  void iterate(Walk& walk, Work& w, int64_t index) {
    const int directions = use_bilateral ? 6 : 3;
    // Few threads and few vertices: a blur takes less time than threads need to meet after it.
    const bool one_task = walk.once([&](int64_t, int64_t* small) {
      const int64_t vertices = larger(w.bilateral.vertices, gaussian.vertices);
      if (p.threads <= 4 && vertices * channels < 150000) raise_flag(small);
    });
    for (int64_t t = 0; t < p.iterations; ++t) {
      if (one_task) {
        walk.once([&](int64_t, int64_t*) {
          for (int64_t task = 0; task < kTasks; ++task) reduce_both(task, w);
          for (int j = 0; j < directions; ++j)
            for (int64_t task = 0; task < kTasks; ++task) blur_both(task, j, w);
        });
      } else {
        walk.tasks([&](int64_t task, int64_t*) { reduce_both(task, w); });
        for (int j = 0; j < directions; ++j)
          walk.tasks([&](int64_t task, int64_t*) { blur_both(task, j, w); });
      }
      const bool is_last = t + 1 == p.iterations;
      walk.tasks([&](int64_t task, int64_t*) { pass(task, w, index, is_last); });
    }
  }

  void reduce_both(int64_t task, Work& w) const {
    if (use_gaussian) gaussian.reduce(task, w.chunks, channels, w.gaussian_values);
    if (use_bilateral) w.bilateral.reduce(task, w.chunks, channels, w.bilateral_values);
  }

  void blur_both(int64_t task, int j, Work& w) const {
    if (channels == 1) {
      if (use_gaussian && j <= 2) gaussian.blur(task, j, w.gaussian_values);
      if (use_bilateral) w.bilateral.blur(task, j, w.bilateral_values);
    } else {
      if (use_gaussian && j <= 2) gaussian.blur_channels(task, j, channels, w.gaussian_values);
      if (use_bilateral) w.bilateral.blur_channels(task, j, channels, w.bilateral_values);
    }
  }

  void clear_sums(int64_t task, Work& w) const {
    if (use_gaussian)
      memset(w.gaussian_values.sums.data + task * gaussian.vertices * channels, 0,
             size_t(gaussian.vertices * channels) * 4);
    if (use_bilateral)
      memset(w.bilateral_values.sums.data + task * w.bilateral.vertices * channels, 0,
             size_t(w.bilateral.vertices * channels) * 4);
  }

  VSOD_INLINE void splat_both(int64_t block, int64_t task, Work& w, Vec<float> z) const {
    if (use_gaussian)
      gaussian.splat(block, z * load(gaussian.norm.data + block * kLanes<float>),
                     w.gaussian_values.sums.data + task * gaussian.vertices);
    if (use_bilateral)
      w.bilateral.splat(block, z * load(w.bilateral.norm.data + block * kLanes<float>),
                        w.bilateral_values.sums.data + task * w.bilateral.vertices);
  }

  // Norm of the bilateral lattice, logits, and the splat of Q_0.
  void first_pass(int64_t task, Work& w, int64_t index) {
    if (task >= w.chunks) return;
    const Range r = part(blocks, task, w.chunks);
    const float* ones = Lattice<5>::blurred(w.bilateral_values);
    if (use_bilateral)
      for (int64_t block = r.begin; block < r.end; ++block) w.bilateral.set_norm(block, ones);
    clear_sums(task, w);
    if (channels > 1) return first_pass_channels(task, w, index);
    const float* prob = p.prob + index * points;
    for (int64_t block = r.begin; block < r.end; ++block) {
      const int64_t first = block * kLanes<float>;
      Vec<float> q = {};
      if (first + kLanes<float> <= points) q = load(prob + first);
      else
        for (int64_t i = 0; first + i < points; ++i) q[i] = prob[first + i];
      const Vec<float> logit = log_positive(clipped(q)) - log_positive(clipped(1.0f - q));
      store(w.logits.data + first, logit);
      splat_both(block, task, w, marginal_difference(logit));
    }
  }

  // Slice, update, and the splat for the next iteration.
  void pass(int64_t task, Work& w, int64_t index, bool is_last) {
    if (task >= w.chunks) return;
    if (!is_last) clear_sums(task, w);
    if (channels > 1) return pass_channels(task, w, index, is_last);
    const Range r = part(blocks, task, w.chunks);
    const float* gaussian_values = Lattice<2>::blurred(w.gaussian_values);
    const float* bilateral_values = Lattice<5>::blurred(w.bilateral_values);
    float* out = p.out + index * points;
    for (int64_t block = r.begin; block < r.end; ++block) {
      const int64_t first = block * kLanes<float>;
      Vec<float> logit = load(w.logits.data + first);
      if (use_gaussian)
        logit += gaussian.slice(block, gaussian_values) * load(gaussian.norm.data + first) *
                 (p.gaussian_weight * Lattice<2>::kAlpha);
      if (use_bilateral)
        logit += w.bilateral.slice(block, bilateral_values) * load(w.bilateral.norm.data + first) *
                 (p.bilateral_weight * Lattice<5>::kAlpha);
      if (!is_last) {
        splat_both(block, task, w, marginal_difference(logit));
        continue;
      }
      const Vec<float> q = sigmoid(logit);
      if (first + kLanes<float> <= points) store(out + first, q);
      else
        for (int64_t i = 0; first + i < points; ++i) out[first + i] = q[i];
    }
  }

  // ---------------------------------------------------------------- many classes

  // x = softmax(x); those beyond the last class are -inf in, 0 out.
  VSOD_INLINE void softmax(float* x) const {
    Vec<float> most = load(x);
    for (int64_t c = kLanes<float>; c < channels; c += kLanes<float>)
      most = maximum<float>(most, load(x + c));
    const Vec<float> top = broadcast(horizontal_max<float>(most));
    Vec<float> sum = {};
    for (int64_t c = 0; c < channels; c += kLanes<float>) {
      const Vec<float> e = exp_nonpositive(load(x + c) - top);
      store(x + c, e);
      sum += e;
    }
    const float scale = 1.0f / horizontal_sum<float>(sum);
    for (int64_t c = 0; c < channels; c += kLanes<float>) store(x + c, load(x + c) * scale);
  }

  VSOD_INLINE void splat_channels(int64_t block, int lane, int64_t task, Work& w,
                                  const float* q) const {
    const int64_t n = block * kLanes<float> + lane;
    if (use_gaussian)
      gaussian.splat_add(block, lane, q, channels, gaussian.norm.data[n],
                         w.gaussian_values.sums.data + task * gaussian.vertices * channels);
    if (use_bilateral)
      w.bilateral.splat_add(block, lane, q, channels, w.bilateral.norm.data[n],
                            w.bilateral_values.sums.data + task * w.bilateral.vertices * channels);
  }

  void first_pass_channels(int64_t task, Work& w, int64_t index) {
    const Range r = part(blocks, task, w.chunks);
    const float* prob = p.prob + index * p.classes * points;
    float* q = w.rows.data + task * channels;
    for (int64_t n = r.begin * kLanes<float>; n < smaller(r.end * kLanes<float>, points); ++n) {
      float* logits = w.logits.data + n * channels;
      for (int64_t c = 0; c < channels; ++c)
        logits[c] = c < p.classes ? prob[c * points + n] : 1.0f;
      for (int64_t c = 0; c < channels; c += kLanes<float>) {
        const Vec<float> x = log_positive(clipped(load(logits + c)));
        store(logits + c, x);
      }
      for (int64_t c = p.classes; c < channels; ++c) logits[c] = -1e30f;
      for (int64_t c = 0; c < channels; ++c) q[c] = logits[c];
      softmax(q);
      splat_channels(n / kLanes<float>, int(n % kLanes<float>), task, w, q);
    }
  }

  void pass_channels(int64_t task, Work& w, int64_t index, bool is_last) {
    const Range r = part(blocks, task, w.chunks);
    const float* gaussian_values = Lattice<2>::blurred(w.gaussian_values);
    const float* bilateral_values = Lattice<5>::blurred(w.bilateral_values);
    float* out = p.out + index * p.classes * points;
    float* q = w.rows.data + task * channels;
    for (int64_t n = r.begin * kLanes<float>; n < smaller(r.end * kLanes<float>, points); ++n) {
      const int64_t block = n / kLanes<float>;
      const int lane = int(n % kLanes<float>);
      for (int64_t c = 0; c < channels; ++c) q[c] = w.logits.data[n * channels + c];
      if (use_gaussian)
        gaussian.slice_add(block, lane, gaussian_values, channels,
                           gaussian.norm.data[n] * (p.gaussian_weight * Lattice<2>::kAlpha), q);
      if (use_bilateral)
        w.bilateral.slice_add(block, lane, bilateral_values, channels,
                              w.bilateral.norm.data[n] * (p.bilateral_weight * Lattice<5>::kAlpha),
                              q);
      softmax(q);
      if (is_last)
        for (int64_t c = 0; c < p.classes; ++c) out[c * points + n] = q[c];
      else splat_channels(block, lane, task, w, q);
    }
  }
};

// What each thread does.
void work_through(Run& run) {
  const int64_t me = __atomic_fetch_add(&run.arrived, 1, __ATOMIC_RELAXED);
  const auto walk = [&](int64_t i) { return Walk(run.phase.data + i * run.phases); };
  const auto failed = [&](int64_t missing) {
    raise_flag(&run.missing, missing);
    return missing != 0;
  };
  Walk first = walk(0);
  if (failed(run.start(first))) return;
  Walk own_images = walk(1);
  own_images.run(run.own_images, [&](int64_t index, int64_t*) {
    Phase* phases = run.phase.data + (2 + me) * run.phases;
    memset(static_cast<void*>(phases), 0, size_t(run.phases) * sizeof(Phase));
    Walk alone(phases);
    failed(run.image(alone, run.work[me], index));
  });
  for (int64_t i = 0; i < run.shared_images; ++i) {
    Walk together = walk(2 + run.p.threads + i);
    if (failed(run.image(together, run.work[0], run.own_images + i))) return;
  }
}

int64_t forward(const Problem& p, Parallel parallel) {
  Run state(p);
  if (!state.missing)
    parallel([](void* context) { work_through(*static_cast<Run*>(context)); }, &state);
  return state.missing;
}

constexpr Kernel kKernel = {forward};

}  // namespace

extern const Kernel* const dense_crf_kernels[];
const Kernel* const dense_crf_kernels[] = {&kKernel};

}  // namespace VSOD_LEVEL
}  // namespace vsod

#else

namespace vsod {
namespace VSOD_LEVEL {

extern const dense_crf::Kernel* const dense_crf_kernels[];
const dense_crf::Kernel* const dense_crf_kernels[] = {nullptr};

}  // namespace VSOD_LEVEL
}  // namespace vsod

#endif
