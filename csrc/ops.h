// The native ops as library.cpp registers them; each is described in its own folder.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace reprdpo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> probe_reward_cpu(
    std::vector<Tensor> hidden_states, std::optional<Tensor> index, Tensor probe_weight, Tensor probe_bias,
    std::optional<Tensor> gate_weight, Tensor gate_bias, std::string gate, bool save_pooled,
    std::optional<double> alpha, bool squash, std::optional<double> floor, bool reduce_batch);

std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor> probe_reward_backward_cpu(
    std::optional<Tensor> grad_reward, std::optional<Tensor> grad_scores, std::optional<Tensor> grad_gate,
    std::optional<Tensor> pooled, std::optional<Tensor> index, Tensor probe_weight,
    std::optional<Tensor> gate_weight, Tensor layer_scores, Tensor layer_gate, std::string gate,
    std::vector<int64_t> hidden_shape, int64_t hidden_count, ScalarType hidden_dtype,
    std::vector<bool> needs);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> probe_reward_cuda(
    std::vector<Tensor> hidden_states, std::optional<Tensor> index, Tensor probe_weight, Tensor probe_bias,
    std::optional<Tensor> gate_weight, Tensor gate_bias, std::string gate, bool save_pooled,
    std::optional<double> alpha, bool squash, std::optional<double> floor, bool reduce_batch);

std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor> probe_reward_backward_cuda(
    std::optional<Tensor> grad_reward, std::optional<Tensor> grad_scores, std::optional<Tensor> grad_gate,
    std::optional<Tensor> pooled, std::optional<Tensor> index, Tensor probe_weight,
    std::optional<Tensor> gate_weight, Tensor layer_scores, Tensor layer_gate, std::string gate,
    std::vector<int64_t> hidden_shape, int64_t hidden_count, ScalarType hidden_dtype,
    std::vector<bool> needs);

}  // namespace reprdpo
