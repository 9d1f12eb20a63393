// What the CPU and the CUDA side of probe_reward share: where the pooled rows lie, and checked parameters.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"
#include "probe_reward/gate.h"
#include "probe_reward/probe_reward.h"

namespace reprdpo::probe_reward {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Where the rows of one layer lie; strides in bytes.
struct Layer {
  const char* data;
  int64_t sequence_stride;
  int64_t token_stride;
  int64_t element_stride;
};

// The pooled rows of all layers, on the CPU or on a CUDA device: the four forms of hidden_states come down to
// this.
struct PooledRows {
  std::vector<Layer> layers;
  RowType type;
  int64_t element_size;
  int64_t sequences;
  int64_t dim;
  int64_t tokens = 1;
  const int64_t* index = nullptr;

  // Null where the index points nowhere.
  const char* row(int64_t layer, int64_t sequence) const {
    const int64_t token = index == nullptr ? 0 : index[sequence];
    if (token < 0 || token >= tokens) return nullptr;
    const Layer& from = layers[layer];
    return from.data + sequence * from.sequence_stride + token * from.token_stride;
  }
};

inline RowType row_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return RowType::kFloat;
    case ScalarType::BFloat16:
      return RowType::kBFloat16;
    case ScalarType::Half:
      return RowType::kHalf;
    default:
      STD_TORCH_CHECK(false, "hidden_states must be float32, bfloat16 or float16");
  }
}

// Layer `number` of a tensor that holds several along `layer_dim` (none where it is -1).
inline Layer layer_of(const Tensor& hidden, int64_t layer_dim, int64_t number, bool has_tokens) {
  const int64_t size = static_cast<int64_t>(hidden.element_size());
  const int64_t last = hidden.dim() - 1;
  const int64_t sequence_dim = layer_dim == 0 ? 1 : 0;
  const bool packed = has_tokens && hidden.dim() == 2;
  const int64_t offset = layer_dim < 0 ? 0 : number * hidden.stride(layer_dim);
  return {static_cast<const char*>(hidden.const_data_ptr()) + offset * size,
          packed ? 0 : hidden.stride(sequence_dim) * size, has_tokens ? hidden.stride(last - 1) * size : 0,
          hidden.stride(last) * size};
}

// index is read where the states are: `index` of the result is a device pointer where they are on one.
inline PooledRows pooled_rows(const std::vector<Tensor>& hidden_states, const std::optional<Tensor>& index) {
  STD_TORCH_CHECK(!hidden_states.empty(), "hidden_states must hold at least one layer");
  const Tensor& first = hidden_states[0];
  const bool on_cuda = first.is_cuda();
  for (const Tensor& hidden : hidden_states) {
    STD_TORCH_CHECK((on_cuda ? hidden.is_cuda() : hidden.is_cpu()) &&
                        hidden.scalar_type() == first.scalar_type() && hidden.dim() == first.dim() &&
                        std::equal(hidden.sizes().begin(), hidden.sizes().end(), first.sizes().begin()),
                    "hidden_states must be tensors of one device, one dtype and one shape");
  }
  PooledRows rows;
  rows.type = row_type(first.scalar_type());
  rows.element_size = static_cast<int64_t>(first.element_size());
  rows.dim = first.size(first.dim() - 1);
  if (!index.has_value()) {
    STD_TORCH_CHECK(hidden_states.size() == 1 && first.dim() == 3,
                    "pooled hidden_states must be one [B, L, D]");
    rows.sequences = first.size(0);
    for (int64_t l = 0; l < first.size(1); ++l) rows.layers.push_back(layer_of(first, 1, l, false));
    return rows;
  }
  const bool stacked = first.dim() == 4;
  STD_TORCH_CHECK(stacked ? hidden_states.size() == 1 : first.dim() == 2 || first.dim() == 3,
                  "hidden_states must be L of [B, T, D] or [N, D], or one [L, B, T, D]");
  rows.tokens = first.size(first.dim() - 2);
  rows.sequences = first.dim() == 2 ? index->numel() : first.size(first.dim() - 3);
  check_dense("index", *index, ScalarType::Long, {rows.sequences}, on_cuda);
  rows.index = index->const_data_ptr<int64_t>();
  if (stacked) {
    for (int64_t l = 0; l < first.size(0); ++l) rows.layers.push_back(layer_of(first, 0, l, true));
  } else {
    for (const Tensor& hidden : hidden_states) rows.layers.push_back(layer_of(hidden, -1, 0, true));
  }
  return rows;
}

inline Gate gate_named(const std::string& name) {
  if (name == "softmax") return Gate::kSoftmax;
  if (name == "vote") return Gate::kVote;
  STD_TORCH_CHECK(name == "static", "gate must be softmax, static or vote");
  return Gate::kStatic;
}

inline const float* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<float>() : nullptr;
}

// The parameters' values, float32 and dense; gate_weight is v [L, D] or V [L, L], null for the static gate.
inline void check_weights(Gate gate, const Tensor& probe_weight, const std::optional<Tensor>& gate_weight,
                          int64_t L, int64_t D, bool on_cuda) {
  check_dense("probe_weight", probe_weight, ScalarType::Float, {L, D}, on_cuda);
  STD_TORCH_CHECK(gate_weight.has_value() == (gate != Gate::kStatic), "gate_weight does not fit the gate");
  if (gate_weight.has_value()) {
    check_dense("gate_weight", *gate_weight, ScalarType::Float, {L, gate == Gate::kVote ? L : D}, on_cuda);
  }
}

// The confidence's options, where alpha asks for it; sequences are then all chosen, then all rejected.
inline std::optional<Confidence> confidence_options(std::optional<double> alpha, bool squash,
                                                    std::optional<double> floor, bool reduce_batch,
                                                    int64_t sequences) {
  if (!alpha.has_value()) return std::nullopt;
  STD_TORCH_CHECK(sequences % 2 == 0, "a confidence needs as many chosen as rejected sequences");
  return Confidence{*alpha, squash, floor, reduce_batch};
}

// What probe_reward_backward is given besides gradients; the shape says how hidden_states came.
struct BackwardShape {
  bool pooled_rows;  // hidden_states was one [B, L, D], index None
  bool stacked;      // one [L, B, T, D]
  bool packed;       // L of [N, D]
  int64_t B, L, D, tokens;
};

inline BackwardShape backward_shape(const std::vector<int64_t>& hidden_shape, int64_t hidden_count,
                                    const std::optional<Tensor>& index, const Tensor& layer_scores) {
  const int64_t rank = static_cast<int64_t>(hidden_shape.size());
  STD_TORCH_CHECK(layer_scores.dim() == 2 && rank >= 2 && rank <= 4,
                  "hidden_shape has no form of hidden_states");
  BackwardShape shape{!index.has_value(),
                      rank == 4,
                      rank == 2,
                      layer_scores.size(0),
                      layer_scores.size(1),
                      hidden_shape.back(),
                      hidden_shape[rank - 2]};
  const std::vector<int64_t> wanted = shape.pooled_rows ? std::vector<int64_t>{shape.B, shape.L, shape.D}
                                      : shape.stacked
                                          ? std::vector<int64_t>{shape.L, shape.B, shape.tokens, shape.D}
                                      : shape.packed ? hidden_shape
                                                     : std::vector<int64_t>{shape.B, shape.tokens, shape.D};
  STD_TORCH_CHECK(
      hidden_shape == wanted && hidden_count == (shape.pooled_rows || shape.stacked ? 1 : shape.L),
      "hidden_shape and hidden_count do not fit the scores");
  return shape;
}

// The tensors that every backward reads, as float32 values; null where there is none.
struct BackwardTensors {
  Upstream upstream;
  const float *scores, *gate, *gate_weight;
  const int64_t* index;
};

inline Strided strided(const char* name, const std::optional<Tensor>& grad,
                       std::initializer_list<int64_t> shape, bool on_cuda) {
  if (!grad.has_value()) return {nullptr, 0, 0};
  check_shape(name, *grad, shape);
  STD_TORCH_CHECK((on_cuda ? grad->is_cuda() : grad->is_cpu()) && grad->scalar_type() == ScalarType::Float,
                  name, " must be a float32 tensor of the device that the op takes");
  return {grad->const_data_ptr<float>(), grad->stride(0), shape.size() == 2 ? grad->stride(1) : 0};
}

inline BackwardTensors check_backward(
    const BackwardShape& shape, Gate gate, const std::optional<Tensor>& grad_reward,
    const std::optional<Tensor>& grad_scores, const std::optional<Tensor>& grad_gate,
    const std::optional<Tensor>& index, const Tensor& probe_weight, const std::optional<Tensor>& gate_weight,
    const Tensor& layer_scores, const Tensor& layer_gate, const std::vector<bool>& needs, bool on_cuda) {
  const int64_t B = shape.B, L = shape.L;
  check_weights(gate, probe_weight, gate_weight, L, shape.D, on_cuda);
  check_dense("layer_scores", layer_scores, ScalarType::Float, {B, L}, on_cuda);
  check_dense("layer_gate", layer_gate, ScalarType::Float, {B, L}, on_cuda);
  if (index.has_value()) check_dense("index", *index, ScalarType::Long, {B}, on_cuda);
  STD_TORCH_CHECK(needs.size() == 5 && !(needs[3] && gate == Gate::kStatic), "needs does not fit the gate");
  return {{strided("grad_reward", grad_reward, {B}, on_cuda),
           strided("grad_scores", grad_scores, {B, L}, on_cuda),
           strided("grad_gate", grad_gate, {B, L}, on_cuda)},
          layer_scores.const_data_ptr<float>(),
          layer_gate.const_data_ptr<float>(),
          data_or_null(gate_weight),
          index.has_value() ? index->const_data_ptr<int64_t>() : nullptr};
}

// Uninitialised gradients of the parameters, empty where nobody asks. A weight that multiplies the pooled
// rows has none without them.
struct ParameterGradients {
  Tensor probe_weight, probe_bias, gate_weight, gate_bias;

  static float* data_of(Tensor& grad) { return grad.dim() == 2 ? grad.mutable_data_ptr<float>() : nullptr; }
  float* probe_weight_data() { return data_of(probe_weight); }
  float* gate_weight_data() { return data_of(gate_weight); }
};

inline ParameterGradients new_parameter_gradients(Gate gate, int64_t L, int64_t D, bool has_rows,
                                                  const std::vector<bool>& needs, const Tensor& like) {
  const auto make = [&](bool needed, std::vector<int64_t> shape) {
    return torch::stable::new_empty(like, needed ? shape : std::vector<int64_t>{0});
  };
  const bool vote = gate == Gate::kVote;
  return {make(needs[1] && has_rows, {L, D}), make(needs[2], {L}),
          make(needs[3] && (vote || has_rows), {L, vote ? L : D}), make(needs[4], {L})};
}

}  // namespace reprdpo::probe_reward
