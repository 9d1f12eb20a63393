// Which function serves a native op on CUDA; the schemas are in library.cpp, whose library is loaded first.
#include <torch/csrc/stable/library.h>

#include <string>

#include "ops.h"

namespace {
std::string build() { return REPRDPO_BUILD; }
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reprdpo_native, CompositeExplicitAutograd, library) {
  library.impl("cuda_build", TORCH_BOX(&build));
}

STABLE_TORCH_LIBRARY_IMPL(reprdpo_native, CUDA, library) {
  library.impl("probe_reward", TORCH_BOX(&reprdpo::probe_reward_cuda));
  library.impl("probe_reward_backward", TORCH_BOX(&reprdpo::probe_reward_backward_cuda));
}
