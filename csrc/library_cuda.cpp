// Which function serves a native op on CUDA; the schemas are in library.cpp, whose library is loaded first.
#include <torch/csrc/stable/library.h>

#include <string>

#include "common/cuda_queries.h"
#include "ops.h"

namespace {
// After a semicolon, why the library cannot serve here.
std::string build() {
  const std::string reason = reprdpo::unfit_here({REPRDPO_CUDA_ARCHS});
  return reason.empty() ? REPRDPO_BUILD : REPRDPO_BUILD "; " + reason;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reprdpo_native, CompositeExplicitAutograd, library) {
  library.impl("cuda_build", TORCH_BOX(&build));
}

STABLE_TORCH_LIBRARY_IMPL(reprdpo_native, CUDA, library) {
  library.impl("probe_reward", TORCH_BOX(&reprdpo::probe_reward_cuda));
  library.impl("probe_reward_backward", TORCH_BOX(&reprdpo::probe_reward_backward_cuda));
}
