// Every native op: its schema, and which function serves it on the CPU (on CUDA: library_cuda.cpp). The
// public ops, torch.ops.reprdpo.*, their checks, fakes and autograd are Python's (reprdpo/ops); these are
// called by them alone.
#include <torch/csrc/stable/library.h>

#include "common/cpu_capability.h"
#include "ops.h"

namespace {
std::string build() { return REPRDPO_BUILD; }
std::string cpu_capability_name() { return reprdpo::name(reprdpo::cpu_capability()); }
}  // namespace

STABLE_TORCH_LIBRARY(reprdpo_native, library) {
  library.def("cpu_build() -> str");
  library.def("cuda_build() -> str");
  library.def("cpu_capability() -> str");
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
}

STABLE_TORCH_LIBRARY_IMPL(reprdpo_native, CompositeExplicitAutograd, library) {
  library.impl("cpu_build", TORCH_BOX(&build));
  library.impl("cpu_capability", TORCH_BOX(&cpu_capability_name));
}

STABLE_TORCH_LIBRARY_IMPL(reprdpo_native, CPU, library) {
  library.impl("probe_reward", TORCH_BOX(&reprdpo::probe_reward_cpu));
  library.impl("probe_reward_backward", TORCH_BOX(&reprdpo::probe_reward_backward_cpu));
}
