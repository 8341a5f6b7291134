// Host side of shunted attention on the CPU: checks, allocation, choice of the SIMD level.
// Schemas are in vsod_ops/shunted_attention/schemas.inc, the kernel in cpu_kernel.cpp.

#include "cpu.h"

#include <string.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../common/levels.h"
#include "../common/parallel.h"
#include "../common/schemas.h"
#include "../common/tensors.h"

namespace vsod {

VSOD_LEVEL_TABLES(const shunted_attention::Kernel*, shunted_attention_kernels)

namespace shunted_attention {
namespace {

using Tensors = std::vector<Tensor>;

constexpr const char* kOp = "shunted_attention";
constexpr int64_t kMostHeadDim = 256;

Operand operand(const Tensor& x) {
  return {x.data_ptr(), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}};
}

// What the kernel relies on; shunted_attention() in Python says the same with its own words.
Check check(const Tensor& q, const Tensors& keys, const Tensors& values) {
  const Check check(kOp, Device::kCpu);
  check.first("q", q, 4);
  check.floating("q", q);
  const int64_t batch = q.size(0), head_dim = q.size(3);
  STD_TORCH_CHECK(head_dim >= 1 && head_dim <= kMostHeadDim, kOp, ": head_dim must be 1 to ",
                  kMostHeadDim, ", got ", head_dim);
  STD_TORCH_CHECK(!keys.empty() && keys.size() == values.size(), kOp, ": got ", keys.size(),
                  " keys and ", values.size(), " values, but each group needs one of both");
  int64_t heads = 0;
  for (size_t g = 0; g < keys.size(); ++g) {
    const std::string index = "[" + std::to_string(g) + "]";
    check.first(("keys" + index).c_str(), keys[g], 4);
    const Sizes sizes{batch, keys[g].size(1), keys[g].size(2), head_dim};
    check.fits("keys" + index, keys[g], q, q.scalar_type(), sizes, Stride::kAny);
    check.fits("values" + index, values[g], q, q.scalar_type(), sizes, Stride::kAny);
    STD_TORCH_CHECK(sizes[1] >= 1 && sizes[2] >= 1, kOp, ": keys", index, " has no keys");
    heads += sizes[1];
  }
  STD_TORCH_CHECK(heads == q.size(1), kOp, ": keys have ", heads, " heads, q has ", q.size(1));
  return check;
}

std::vector<Group> make_groups(const Tensors& keys, const Tensors& values) {
  std::vector<Group> groups(keys.size());
  int64_t first_head = 0;
  for (size_t g = 0; g < keys.size(); ++g) {
    groups[g] = Group{
        first_head, keys[g].size(1), keys[g].size(2), operand(keys[g]), operand(values[g]), {},
        {},         nullptr};
    first_head += keys[g].size(1);
  }
  return groups;
}

void longest_first(std::vector<Group>& groups) {
  std::stable_sort(groups.begin(), groups.end(),
                   [](const Group& a, const Group& b) { return a.length > b.length; });
}

Problem problem_of(const Tensor& q, const Tensor& out, const Tensor& lse, double scale,
                   std::vector<Group>& groups) {
  Problem p{};
  p.batch = q.size(0), p.heads = q.size(1), p.queries = q.size(2), p.head_dim = q.size(3);
  p.scale = scale;
  p.group_count = int64_t(groups.size()), p.groups = groups.data();
  p.q = operand(q), p.out = operand(out), p.lse = lse.data_ptr();
  return p;
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, Tensors keys, Tensors values, double scale) {
  check(q, keys, values);
  const Kernel& kernel = *shunted_attention_kernels(dtype_of(q));
  const Allocator allocate(kOp, q);
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), head_dim = q.size(3);
  Tensor out = allocate.empty_like(q);
  Tensor lse = allocate.empty({batch, heads, queries}, compute_type(q));
  if (q.numel() == 0) return {out, lse};
  std::vector<Group> groups = make_groups(keys, values);
  // One allocation for all groups: each costs as much as a small call's arithmetic.
  int64_t numbers = 0;
  const auto packed_of = [&](const Group& group) {
    return batch * group.heads * kernel.packed_elements(group.length, head_dim);
  };
  for (const Group& group : groups) numbers += packed_of(group);
  const Tensor packed = allocate.empty({numbers}, compute_type(q));
  char* at = static_cast<char*>(packed.data_ptr());
  for (Group& group : groups) {
    group.packed = at;
    at += packed_of(group) * packed.element_size();
  }
  longest_first(groups);
  check_memory(kOp, kernel.forward(problem_of(q, out, lse, scale, groups), on_each_thread));
  return {out, lse};
}

std::tuple<Tensor, Tensors, Tensors> backward(const Tensor& grad_out, const Tensor& q, Tensors keys,
                                              Tensors values, const Tensor& out, const Tensor& lse,
                                              double scale, bool need_q,
                                              std::vector<bool> need_keys,
                                              std::vector<bool> need_values) {
  const Check check = shunted_attention::check(q, keys, values);
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), head_dim = q.size(3);
  check.fits("grad_out", grad_out, q, q.scalar_type(), sizes_of(q), Stride::kAny);
  check.fits("out", out, q, q.scalar_type(), sizes_of(q), Stride::kAny);
  check.fits("lse", lse, q, compute_type(q), {batch, heads, queries}, Stride::kContiguous);
  STD_TORCH_CHECK(need_keys.size() == keys.size() && need_values.size() == keys.size(), kOp,
                  ": need_keys and need_values must have ", keys.size(), " elements, got ",
                  need_keys.size(), " and ", need_values.size());
  const Kernel& kernel = *shunted_attention_kernels(dtype_of(q));
  const Allocator allocate(kOp, q);
  const ScalarType wide = compute_type(q);

  const auto gradient = [&](const Tensor& x, bool need) {
    if (!need) return allocate.empty({0}, x.scalar_type());
    return q.numel() > 0 ? allocate.empty_like(x) : allocate.zeros(sizes_of(x), x.scalar_type());
  };
  Tensor dq = gradient(q, need_q);
  Tensors dkeys, dvalues;
  std::vector<Group> groups = make_groups(keys, values);
  for (size_t g = 0; g < groups.size(); ++g) {
    dkeys.push_back(gradient(keys[g], need_keys[g]));
    dvalues.push_back(gradient(values[g], need_values[g]));
    if (need_keys[g]) groups[g].dk = operand(dkeys[g]);
    if (need_values[g]) groups[g].dv = operand(dvalues[g]);
  }
  if (q.numel() == 0) return {dq, dkeys, dvalues};
  longest_first(groups);

  Problem problem = problem_of(q, out, lse, scale, groups);
  problem.grad_out = operand(grad_out);
  const int64_t rows = batch * heads * queries;
  const int64_t sums = need_q ? batch * heads * kernel.dq_sum_elements(queries, head_dim) : 0;
  const Tensor work = allocate.empty({sums + 3 * rows}, wide);
  char* at = static_cast<char*>(work.data_ptr());
  const auto take = [&](int64_t numbers) {
    char* const taken = at;
    at += numbers * work.element_size();
    return taken;
  };
  problem.dq_sum = take(sums);  // first: whole vectors, aligned as the allocation is
  problem.row_terms = take(2 * rows);
  problem.turns = reinterpret_cast<int32_t*>(take(rows));
  memset(problem.turns, 0, rows * sizeof(int32_t));
  if (need_q) problem.dq = operand(dq);
  check_memory(kOp, kernel.backward(problem, on_each_thread));
  return {dq, dkeys, dvalues};
}

// A call that names no backend: as op.py does for the others, with a default scale.

double factor(const Tensor& q, std::optional<double> scale) {
  return scale ? *scale : std::pow(double(q.size(3)), -0.5);
}

std::tuple<Tensor, Tensor> forward_unnamed(const Tensor& q, Tensors keys, Tensors values,
                                           std::optional<double> scale) {
  return forward(q, keys, values, factor(q, scale));
}

std::tuple<Tensor, Tensors, Tensors> backward_unnamed(const Tensor& grad_out, const Tensor& q,
                                                      Tensors keys, Tensors values,
                                                      const Tensor& out, const Tensor& lse,
                                                      std::optional<double> scale, bool need_q,
                                                      std::vector<bool> need_keys,
                                                      std::vector<bool> need_values) {
  return backward(grad_out, q, keys, values, out, as_contiguous(lse), factor(q, scale), need_q,
                  need_keys, need_values);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vsod_ops, m) {
  define_all(m,
#include "../../vsod_ops/shunted_attention/schemas.inc"
  );
}

STABLE_TORCH_LIBRARY_IMPL(vsod_ops, CPU, m) {
  m.impl("shunted_attention_cpu", TORCH_BOX(&forward));
  m.impl("shunted_attention_backward_cpu", TORCH_BOX(&backward));
  if (!level_is_known()) return;
  m.impl("shunted_attention.unnamed", TORCH_BOX(&forward_unnamed));
  m.impl("shunted_attention_backward.unnamed", TORCH_BOX(&backward_unnamed));
}

}  // namespace shunted_attention
}  // namespace vsod
