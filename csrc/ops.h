// The native ops as library.cpp registers them; each is described in its own folder.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace reprdpo {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor> probe_reward_cpu(
    std::vector<Tensor> hidden_states, std::optional<Tensor> index, Tensor probe_weight, Tensor probe_bias,
    std::optional<Tensor> gate_weight, Tensor gate_bias, std::string gate, bool save_pooled);

}  // namespace reprdpo
