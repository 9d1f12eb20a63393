// Every native op: its schema, and which function serves it on the CPU (on CUDA: library_cuda.cpp). The
// public ops, torch.ops.reprdpo.*, their checks, fakes and autograd are Python's (reprdpo/ops); these are
// called by them alone.
#include <torch/csrc/stable/library.h>

#include "common/cpu_capability.h"
#include "common/large_memory.h"
#include "ops.h"

namespace {
std::string build() { return REPRDPO_BUILD; }
std::string cpu_capability_name() { return reprdpo::name(reprdpo::cpu_capability()); }
std::tuple<int64_t, int64_t, int64_t> large_memory() {
  const reprdpo::LargeMemory memory = reprdpo::large_memory();
  return {static_cast<int64_t>(memory.used), static_cast<int64_t>(memory.most_used),
          static_cast<int64_t>(memory.kept)};
}
}  // namespace

STABLE_TORCH_LIBRARY(reprdpo_native, library) {
  library.def("cpu_build() -> str");
  library.def("cuda_build() -> str");
  library.def("cpu_capability() -> str");
  library.def("large_memory() -> (int used, int most_used, int kept)");
  library.def("reset_most_used() -> ()");
  library.def("release_kept_memory() -> ()");
  library.def(
      "probe_reward(Tensor[] hidden_states, Tensor? index, Tensor probe_weight, Tensor probe_bias, "
      "Tensor? gate_weight, Tensor gate_bias, str gate, bool save_pooled, "
      "float? alpha, bool squash, float? floor, bool reduce_batch) "
      "-> (Tensor reward, Tensor layer_scores, Tensor layer_gate, Tensor pooled, Tensor confidence)");
  library.def(
      "probe_reward_backward(Tensor? grad_reward, Tensor? grad_scores, Tensor? grad_gate, Tensor? pooled, "
      "Tensor? index, Tensor probe_weight, Tensor? gate_weight, Tensor layer_scores, Tensor layer_gate, "
      "str gate, SymInt[] hidden_shape, int hidden_count, ScalarType hidden_dtype, bool[] needs) "
      "-> (Tensor[], Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "linear_token_residual(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, float logit_scale, "
      "float? softcap, float temperature, bool residual, bool entropy, bool stats) "
      "-> (Tensor logp, Tensor row_stats, Tensor entropy, Tensor top1, Tensor mean_logit, Tensor residual)");
  library.def("new_weight_grad(Tensor weight, ScalarType dtype) -> Tensor");
  library.def(
      "residual_weight_grad(Tensor residual, Tensor hidden, Tensor scale, Tensor(a!) out, bool accumulate) "
      "-> ()");
  library.def("residual_hidden_grad(Tensor residual, Tensor weight, Tensor scale, Tensor(a!) out) -> ()");
  library.def(
      "sparse_residual_product(Tensor residual, Tensor weight, float mass) -> (Tensor product, Tensor kept)");
  library.def(
      "logprob(Tensor logits, Tensor labels, float temperature, int ignore_index) "
      "-> (Tensor logp, Tensor row_stats)");
  library.def(
      "logprob_backward(Tensor grad_logp, Tensor logits, Tensor labels, Tensor row_stats, float temperature, "
      "int ignore_index, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(reprdpo_native, CompositeExplicitAutograd, library) {
  library.impl("cpu_build", TORCH_BOX(&build));
  library.impl("cpu_capability", TORCH_BOX(&cpu_capability_name));
  library.impl("large_memory", TORCH_BOX(&large_memory));
  library.impl("reset_most_used", TORCH_BOX(&reprdpo::reset_most_used));
  library.impl("release_kept_memory", TORCH_BOX(&reprdpo::release_kept_memory));
}

STABLE_TORCH_LIBRARY_IMPL(reprdpo_native, CPU, library) {
  library.impl("probe_reward", TORCH_BOX(&reprdpo::probe_reward_cpu));
  library.impl("probe_reward_backward", TORCH_BOX(&reprdpo::probe_reward_backward_cpu));
  library.impl("linear_token_residual", TORCH_BOX(&reprdpo::linear_token_residual_cpu));
  library.impl("new_weight_grad", TORCH_BOX(&reprdpo::new_weight_grad_cpu));
  library.impl("residual_weight_grad", TORCH_BOX(&reprdpo::residual_weight_grad_cpu));
  library.impl("residual_hidden_grad", TORCH_BOX(&reprdpo::residual_hidden_grad_cpu));
  library.impl("sparse_residual_product", TORCH_BOX(&reprdpo::sparse_residual_product_cpu));
  library.impl("logprob", TORCH_BOX(&reprdpo::logprob_cpu));
  library.impl("logprob_backward", TORCH_BOX(&reprdpo::logprob_backward_cpu));
}
