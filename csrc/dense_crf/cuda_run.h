// The launches of dense_crf, on tensors.  Used with two launchers: that of cuda.cu launches on a
// GPU, that of cuda_on_host.cpp runs the same kernels in loops on the CPU.  A launcher has
//     operator()(kernel)                      kernel(i) for all i below kernel.count()
//     sort(memory, keys, pairs, count, bits)  stable, by the lowest bits; both are replaced
//     scan(memory, from, to, count)           inclusive sums of int32
//     read(pointer)                           one int32, for the host: the only wait
//
// Building a lattice: simplices, sort, heads, scan; the host reads the number of vertices (memory
// for the worst case, one vertex a pair, would be 20 times what frames need); rows, segments,
// neighbours; then ones are filtered and make the norm.
//
// An iteration: splat into segments, gather them into vertices, 6 blurs, update (slice, softmax):
// 9 launches and no wait.  The lattice of positions takes part in the same launches.
//
// Several images go through all of it together, as long as they are below kGroupPoints: the
// image's number is the upper part of a key, so images share no vertices.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "check.h"
#include "cuda_kernels.h"

namespace vsod {
namespace dense_crf_cuda {

using Problem = dense_crf::Numbers;

// Enough to fill a GPU; 8 images of 512 x 512, whose sort takes 0.3 GB.
constexpr int64_t kGroupPoints = int64_t(1) << 21;

// Allocates like `like`, and holds what it gave until it goes.
class Memory {
 public:
  explicit Memory(const Tensor& like) : like_(like) {}

  template <class T>
  T* get(int64_t count) {
    const int64_t bytes = std::max<int64_t>(count, 1) * int64_t(sizeof(T));
    held_.push_back(Allocator("dense_crf", like_).empty({bytes}, ScalarType::Byte));
    return static_cast<T*>(held_.back().data_ptr());
  }

 private:
  const Tensor& like_;
  std::vector<Tensor> held_;
};

inline int bits_for(int64_t values) {
  int bits = 0;
  while ((int64_t(1) << bits) < values) ++bits;
  return bits;
}

inline Values new_values(const Lattice& lattice, int64_t channels, Memory& memory) {
  const int64_t numbers = lattice.copies * lattice.vertices * channels;
  return {memory.get<float>(lattice.copies * lattice.segments * channels),
          memory.get<float>(numbers), memory.get<float>(numbers)};
}

template <class Launcher>
void blur_all(const Launcher& launch, const Filter& filter, int directions) {
  launch(GatherKernel{filter});
  for (int j = 0; j < directions; ++j) launch(BlurKernel{filter, j});
}

// What lasts is from `memory`, the rest is given back on return.
template <int D, class Launcher>
Lattice build(const Launcher& launch, const Geometry<D>& geometry, const Tensor& image,
              const void* first_image, int64_t images, Memory& memory) {
  Memory scratch(image);
  const int64_t width = image.size(3), pixels = image.size(2) * width, points = images * pixels;
  const int64_t pairs = (D + 1) * points;
  float* weights = memory.get<float>(pairs);
  int32_t* ids = memory.get<int32_t>(pairs);
  Entry* entries = memory.get<Entry>(pairs);
  float* norm = memory.get<float>(points);
  uint64_t* vertex_keys = nullptr;

  Lattice lattice{};
  lattice.points = points, lattice.copies = 1;
  lattice.weights = weights, lattice.ids = ids, lattice.entries = entries, lattice.norm = norm;
  {
    Memory sorting(image);
    uint64_t* keys = sorting.get<uint64_t>(pairs);
    uint32_t* pair = sorting.get<uint32_t>(pairs);
    const bool is_float = image.scalar_type() == ScalarType::Float;
    launch(SimplexKernel<D>{geometry, width, pixels, points, first_image, is_float, weights, keys,
                            pair});
    launch.sort(sorting, keys, pair, pairs, geometry.bits + bits_for(images));
    int32_t* heads = sorting.get<int32_t>(pairs);
    int32_t* vertices = sorting.get<int32_t>(pairs);
    launch(HeadKernel{pairs, keys, heads});
    launch.scan(sorting, heads, vertices, pairs);
    lattice.vertices = launch.read(vertices + (pairs - 1));
    lattice.segments = pairs / kSegment + lattice.vertices;
    vertex_keys = scratch.get<uint64_t>(lattice.vertices);
    uint32_t* rows = memory.get<uint32_t>(lattice.vertices + 1);
    lattice.rows = rows;
    launch(
        RowKernel{pairs, points, keys, pair, vertices, weights, vertex_keys, rows, ids, entries});
  }
  Segment* segment = memory.get<Segment>(lattice.segments);
  lattice.segment = segment;
  launch(SegmentKernel{lattice, segment});
  int32_t* neighbours = memory.get<int32_t>(2 * (D + 1) * lattice.vertices);
  lattice.neighbours = neighbours;
  launch(NeighbourKernel<D>{geometry, lattice.vertices, vertex_keys, neighbours});

  Filter ones{};
  ones.channels = 1;
  const Values values = new_values(lattice, 1, scratch);
  (D == 2 ? ones.gaussian : ones.bilateral) = lattice;
  (D == 2 ? ones.gaussian_values : ones.bilateral_values) = values;
  launch(SplatKernel<true>{ones, nullptr});
  blur_all(launch, ones, D + 1);
  launch(NormKernel<D>{lattice, blurred<D>(values), norm});
  launch(ScaleKernel{pairs, norm, entries});
  return lattice;
}

// images_at_once: 0 for as many as fill a GPU.
template <class Launcher>
Tensor forward(const Launcher& launch, const Tensor& prob, const Tensor& image, const Problem& p,
               int64_t images_at_once) {
  STD_TORCH_CHECK(images_at_once >= 0, "dense_crf: images_at_once must be at least 0, got ",
                  images_at_once);
  Tensor out = Allocator("dense_crf", prob).empty_like(prob);
  const int64_t batch = image.size(0), height = image.size(2), width = image.size(3);
  const int64_t pixels = height * width, classes = prob.dim() == 4 ? prob.size(1) : 0;
  const int64_t channels = std::max<int64_t>(classes, 1);
  if (batch * pixels == 0) return out;

  const bool use_gaussian = p.gaussian_weight > 0, use_bilateral = p.bilateral_weight > 0;
  const Geometry<2> positions(height, width, p.gaussian_sxy, 0);
  const Geometry<5> colours(height, width, p.bilateral_sxy, p.bilateral_srgb);
  int64_t group = images_at_once ? images_at_once : std::max<int64_t>(kGroupPoints / pixels, 1);
  group = std::min(group, batch);
  while (group > 1 && colours.fits && colours.bits + bits_for(group) > 63) group /= 2;

  // The lattice of positions is the same for every image of the call.
  Memory lasting(image);
  Lattice gaussian{};
  if (use_gaussian) gaussian = build<2>(launch, positions, image, nullptr, 1, lasting);

  const int64_t pixel_bytes = image.scalar_type() == ScalarType::Float ? 4 : 1;
  for (int64_t first = 0; first < batch; first += group) {
    const int64_t images = std::min(group, batch - first), points = images * pixels;
    Memory memory(image);
    Filter filter{};
    filter.channels = channels;
    if (use_gaussian) {
      filter.gaussian = gaussian;
      filter.gaussian.copies = images;
      filter.gaussian_values = new_values(filter.gaussian, channels, memory);
    }
    if (use_bilateral) {
      const char* from =
          static_cast<const char*>(image.data_ptr()) + first * 3 * pixels * pixel_bytes;
      filter.bilateral = build<5>(launch, colours, image, from, images, memory);
      filter.bilateral_values = new_values(filter.bilateral, channels, memory);
    }
    float* logits = memory.get<float>(points * channels);
    float* q = memory.get<float>(points * channels);
    const int64_t offset = first * pixels * channels;
    launch(StartKernel{pixels, points, classes, static_cast<const float*>(prob.data_ptr()) + offset,
                       logits, q});
    float* to = static_cast<float*>(out.data_ptr()) + offset;
    for (int64_t t = 0; t < p.iterations; ++t) {
      if (classes == 0) launch(SplatKernel<true>{filter, q});
      else launch(SplatKernel<false>{filter, q});
      blur_all(launch, filter, use_bilateral ? 6 : 3);
      launch(UpdateKernel{filter, pixels, points, classes, float(p.gaussian_weight),
                          float(p.bilateral_weight), logits, q,
                          t + 1 == p.iterations ? to : nullptr});
    }
  }
  return out;
}

}  // namespace dense_crf_cuda
}  // namespace vsod
