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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_token_residual_cpu(
    Tensor hidden, Tensor weight, Tensor labels, std::optional<Tensor> bias, double logit_scale,
    std::optional<double> softcap, double temperature, bool residual, bool entropy, bool stats);

Tensor new_weight_grad_cpu(Tensor weight, ScalarType dtype);

void residual_weight_grad_cpu(Tensor residual, Tensor hidden, Tensor scale, Tensor out, bool accumulate);

void residual_hidden_grad_cpu(Tensor residual, Tensor weight, Tensor scale, Tensor out);

std::tuple<Tensor, Tensor> sparse_residual_product_cpu(Tensor residual, Tensor weight, double mass);

std::tuple<Tensor, Tensor> logprob_cpu(Tensor logits, Tensor labels, double temperature,
                                       int64_t ignore_index);

void logprob_backward_cpu(Tensor grad_logp, Tensor logits, Tensor labels, Tensor row_stats,
                          double temperature, int64_t ignore_index, Tensor out);

}  // namespace reprdpo
