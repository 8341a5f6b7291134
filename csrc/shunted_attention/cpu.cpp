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
#include "cpu_layer.h"

namespace vsod {

VSOD_LEVEL_TABLES(const shunted_attention::Kernel*, shunted_attention_kernels)
VSOD_LEVEL_TABLES(const shunted_attention::Linear*, linear_kernels)

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

void longest_first(const Problem& p) {
  std::stable_sort(p.groups, p.groups + p.group_count,
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

void run_forward(const Allocator& allocate, const Kernel& kernel, const Problem& p,
                 ScalarType wide) {
  // One allocation for all groups: each costs as much as a small call's arithmetic.
  int64_t numbers = 0;
  const auto packed_of = [&](const Group& group) {
    return p.batch * group.heads * kernel.packed_elements(group.length, p.head_dim);
  };
  Group* const end = p.groups + p.group_count;
  for (Group* group = p.groups; group != end; ++group) numbers += packed_of(*group);
  const Tensor packed = allocate.empty({numbers}, wide);
  char* at = static_cast<char*>(packed.data_ptr());
  for (Group* group = p.groups; group != end; ++group) {
    group->packed = at;
    at += packed_of(*group) * packed.element_size();
  }
  longest_first(p);
  check_memory(kOp, kernel.forward(p, on_each_thread));
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, Tensors keys, Tensors values, double scale) {
  check(q, keys, values);
  const Kernel& kernel = *shunted_attention_kernels(dtype_of(q));
  const Allocator allocate(kOp, q);
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2);
  Tensor out = allocate.empty_like(q);
  Tensor lse = allocate.empty({batch, heads, queries}, compute_type(q));
  if (q.numel() == 0) return {out, lse};
  std::vector<Group> groups = make_groups(keys, values);
  run_forward(allocate, kernel, problem_of(q, out, lse, scale, groups), compute_type(q));
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
  Problem problem = problem_of(q, out, lse, scale, groups);
  longest_first(problem);
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

double factor(int64_t head_dim, std::optional<double> scale) {
  return scale ? *scale : std::pow(double(head_dim), -0.5);
}

std::tuple<Tensor, Tensor> forward_unnamed(const Tensor& q, Tensors keys, Tensors values,
                                           std::optional<double> scale) {
  return forward(q, keys, values, factor(q.size(3), scale));
}

std::tuple<Tensor, Tensors, Tensors> backward_unnamed(const Tensor& grad_out, const Tensor& q,
                                                      Tensors keys, Tensors values,
                                                      const Tensor& out, const Tensor& lse,
                                                      std::optional<double> scale, bool need_q,
                                                      std::vector<bool> need_keys,
                                                      std::vector<bool> need_values) {
  return backward(grad_out, q, keys, values, out, as_contiguous(lse), factor(q.size(3), scale),
                  need_q, need_keys, need_values);
}

bool reduces(const int64_t* rate) { return rate[0] != 1 || rate[1] != 1 || rate[2] != 1; }

void check_layer(const Tensor& x, const Tensors& projections, const Tensors& reductions,
                 int64_t heads, const std::vector<int64_t>& rates) {
  const Check check(kOp, Device::kCpu);
  check.first("x", x, 5);
  check.fits("x", x, x, ScalarType::Float, sizes_of(x), Stride::kAny);
  const size_t groups = rates.size() / 3;
  const int64_t channels = x.size(4), group_count = int64_t(groups);
  STD_TORCH_CHECK(
      groups >= 1 && heads >= 1 && heads % group_count == 0 && channels >= 1 &&
          channels % heads == 0 && channels % 16 == 0 && channels / heads <= kMostHeadDim,
      kOp, ": ", channels, " channels do not fit ", heads, " heads in ", groups, " groups");
  size_t reduced = 0;
  for (const int64_t rate : rates)
    STD_TORCH_CHECK(rate >= 1, kOp, ": rates must be at least 1, got ", rate);
  for (size_t g = 0; g < groups; ++g) reduced += reduces(&rates[3 * g]);
  const auto check_count = [](const char* name, const Tensors& tensors, size_t count) {
    STD_TORCH_CHECK(tensors.size() == count, kOp, ": got ", tensors.size(), " ", name, ", not ",
                    count);
  };
  check_count("projections", projections, 4 + 2 * groups);
  check_count("reductions", reductions, 2 * reduced);
  const auto check_linear = [&](const std::string& name, const Tensor* weight, const Sizes& sizes) {
    check.fits(name + ".weight", weight[0], x, ScalarType::Float, sizes, Stride::kContiguous);
    check.fits(name + ".bias", weight[1], x, ScalarType::Float, {sizes[0]}, Stride::kContiguous);
  };
  check_linear("query", &projections[0], {channels, channels});
  for (size_t g = 0; g < groups; ++g)
    check_linear("key_value", &projections[2 + 2 * g], {2 * channels / group_count, channels});
  check_linear("out", &projections[2 + 2 * groups], {channels, channels});
  const Tensor* reduction = reductions.data();
  for (size_t g = 0; g < groups; ++g)
    if (const int64_t* rate = &rates[3 * g]; reduces(rate)) {
      check_linear("reduce", reduction, {channels, channels, rate[0], rate[1], rate[2]});
      reduction += 2;
    }
}

// The layer ShuntedAttention with padding="ceil", in float32 and without gradients.  x (B, T, H, W,
// C).  A weight and a bias for each: projections are the query, the keys and values of each group,
// the output; reductions, of the groups whose rate is not 1.  rates: (time, height, width) a group.
Tensor layer(const Tensor& tokens, Tensors projections, Tensors reductions, int64_t heads,
             std::vector<int64_t> rates) {
  check_layer(tokens, projections, reductions, heads, rates);
  const Tensor x = as_contiguous(tokens);
  const Allocator allocate(kOp, x);
  if (x.numel() == 0) return allocate.empty_like(x);
  const int64_t batch = x.size(0), queries = x.size(1) * x.size(2) * x.size(3);
  const int64_t channels = x.size(4), groups = int64_t(rates.size()) / 3;
  const int64_t head_dim = channels / heads, group_heads = heads / groups;

  const Projections project(kOp, *linear_kernels(kFloat32), allocate);
  const Tensor q = project.linear(x, projections[0], projections[1]);
  Tensors keys_values;  // (B, T', H', W', keys of the group, then its values)
  const Tensor* reduction = reductions.data();
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t* rate = &rates[3 * g];
    Tensor in = x;
    if (reduces(rate)) {
      in = project.reduce(x, rate, reduction[0], reduction[1]);
      reduction += 2;
    }
    keys_values.push_back(project.linear(in, projections[2 + 2 * g], projections[3 + 2 * g]));
  }

  const auto heads_of = [&](const Tensor& rows, int64_t length, int64_t first) {
    const int64_t width = rows.size(4);
    return Operand{static_cast<float*>(rows.data_ptr()) + first,
                   {length * width, head_dim, width, 1}};
  };
  const Tensor attended = allocate.empty(sizes_of(x), ScalarType::Float);
  const Tensor lse = allocate.empty({batch, heads, queries}, ScalarType::Float);
  std::vector<Group> of(groups);
  for (int64_t g = 0; g < groups; ++g) {
    const Tensor& rows = keys_values[g];
    const int64_t length = rows.size(1) * rows.size(2) * rows.size(3);
    of[g].first_head = g * group_heads, of[g].heads = group_heads, of[g].length = length;
    of[g].k = heads_of(rows, length, 0), of[g].v = heads_of(rows, length, rows.size(4) / 2);
  }
  Problem p{};
  p.batch = batch, p.heads = heads, p.queries = queries, p.head_dim = head_dim;
  p.scale = factor(head_dim, std::nullopt);
  p.group_count = groups, p.groups = of.data();
  p.q = heads_of(q, queries, 0), p.out = heads_of(attended, queries, 0);
  p.lse = lse.data_ptr();
  run_forward(allocate, *shunted_attention_kernels(kFloat32), p, ScalarType::Float);
  return project.linear(attended, projections[2 + 2 * groups], projections[3 + 2 * groups]);
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
  m.impl("shunted_attention_layer_cpu", TORCH_BOX(&layer));
  if (!level_is_known()) return;
  m.impl("shunted_attention.unnamed", TORCH_BOX(&forward_unnamed));
  m.impl("shunted_attention_backward.unnamed", TORCH_BOX(&backward_unnamed));
}

}  // namespace shunted_attention
}  // namespace vsod
