// Host side of shunted attention on the CPU: checks, allocation, choice of the SIMD level.
// Schemas are in vsod_ops/shunted_attention/op.py, the kernel in cpu_kernel.cpp.

#include "cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../common/levels.h"
#include "../common/parallel.h"
#include "../common/tensors.h"

namespace vsod {

VSOD_LEVEL_TABLES(const shunted_attention::Kernel*, shunted_attention_kernels)

namespace shunted_attention {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

const Kernel& kernel_for(const Tensor& q) {
  return *shunted_attention_kernels(dtype_of("shunted_attention", "q", q));
}

Operand operand(const Tensor& x) {
  return {x.data_ptr(), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}};
}

bool same_shape(const Tensor& a, const Tensor& b) {
  for (int d = 0; d < 4; ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

// What the kernel relies on; shunted_attention() in Python says the same with argument names.
void check(const Tensor& q, const Tensors& keys, const Tensors& values) {
  STD_TORCH_CHECK(q.dim() == 4 && !keys.empty() && keys.size() == values.size(),
                  "shunted_attention: q must be (B, H, N, D), keys and values lists of one length");
  STD_TORCH_CHECK(q.size(3) >= 1 && q.size(3) <= 256, "shunted_attention: head_dim above 256");
  int64_t heads = 0;
  for (size_t g = 0; g < keys.size(); ++g) {
    for (const Tensor* x : {&keys[g], &values[g]})
      STD_TORCH_CHECK(x->is_cpu() && x->dim() == 4 && x->scalar_type() == q.scalar_type(),
                      "shunted_attention: keys and values must be 4-D CPU tensors of q's dtype");
    STD_TORCH_CHECK(same_shape(keys[g], values[g]) && keys[g].size(0) == q.size(0) &&
                        keys[g].size(3) == q.size(3) && keys[g].size(2) >= 1,
                    "shunted_attention: shapes of group ", g, " do not fit");
    heads += keys[g].size(1);
  }
  STD_TORCH_CHECK(heads == q.size(1), "shunted_attention: keys have ", heads, " heads, q has ",
                  q.size(1));
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

std::tuple<Tensor, Tensor> forward(const Tensor& q, Tensors keys, Tensors values, double scale) {
  check(q, keys, values);
  const Kernel& kernel = kernel_for(q);
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), head_dim = q.size(3);
  Tensor out = torch::stable::empty_like(q);
  Tensor lse = torch::stable::new_empty(q, {batch, heads, queries}, compute_type(q));
  std::vector<Group> groups = make_groups(keys, values);
  Tensors packed;
  for (Group& group : groups) {
    packed.push_back(torch::stable::new_empty(
        q, {batch * group.heads * kernel.packed_elements(group.length, head_dim)},
        compute_type(q)));
    group.packed = packed.back().data_ptr();
  }
  longest_first(groups);
  Problem problem{};
  problem.batch = batch, problem.heads = heads, problem.queries = queries;
  problem.head_dim = head_dim, problem.scale = scale;
  problem.group_count = int64_t(groups.size()), problem.groups = groups.data();
  problem.q = operand(q), problem.out = operand(out), problem.lse = lse.data_ptr();
  check_memory("shunted_attention", kernel.forward(problem, on_each_thread));
  return {out, lse};
}

std::tuple<Tensor, Tensors, Tensors> backward(const Tensor& grad_out, const Tensor& q, Tensors keys,
                                              Tensors values, const Tensor& out, const Tensor& lse,
                                              double scale, bool need_q,
                                              std::vector<bool> need_keys,
                                              std::vector<bool> need_values) {
  check(q, keys, values);
  STD_TORCH_CHECK(same_shape(grad_out, q) && same_shape(out, q) && lse.is_contiguous(),
                  "shunted_attention: grad_out, out and q must have one shape, lse be contiguous");
  STD_TORCH_CHECK(grad_out.scalar_type() == q.scalar_type() && out.scalar_type() == q.scalar_type(),
                  "shunted_attention: grad_out and out must have q's dtype");
  const Kernel& kernel = kernel_for(q);
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), head_dim = q.size(3);

  const auto gradient = [&](const Tensor& x, bool need) {
    return need ? torch::stable::empty_like(x) : torch::stable::new_empty(q, {0});
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
  longest_first(groups);

  Problem problem{};
  problem.batch = batch, problem.heads = heads, problem.queries = queries;
  problem.head_dim = head_dim, problem.scale = scale;
  problem.group_count = int64_t(groups.size()), problem.groups = groups.data();
  problem.q = operand(q), problem.out = operand(out), problem.lse = lse.data_ptr();
  problem.grad_out = operand(grad_out);
  Tensor row_terms = torch::stable::new_empty(q, {2, batch, heads, queries}, compute_type(q));
  problem.row_terms = row_terms.data_ptr();
  const int64_t dq_numbers = need_q ? batch * heads * kernel.dq_sum_elements(queries, head_dim) : 0;
  Tensor dq_sum = torch::stable::new_empty(q, {dq_numbers}, compute_type(q));
  Tensor turns = torch::stable::new_zeros(q, {batch, heads, queries}, ScalarType::Int);
  if (need_q) {
    problem.dq = operand(dq);
    problem.dq_sum = dq_sum.data_ptr();
  }
  problem.turns = static_cast<int32_t*>(turns.data_ptr());
  check_memory("shunted_attention", kernel.backward(problem, on_each_thread));
  return {dq, dkeys, dvalues};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vsod_ops, CPU, m) {
  m.impl("shunted_attention_cpu", TORCH_BOX(&forward));
  m.impl("shunted_attention_backward_cpu", TORCH_BOX(&backward));
}

}  // namespace shunted_attention
}  // namespace vsod
