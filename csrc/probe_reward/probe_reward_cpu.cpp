#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/cpu_capability.h"
#include "common/parallel.h"
#include "ops.h"
#include "probe_reward/probe_reward.h"

namespace reprdpo {
namespace probe_reward {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Where the rows of one layer lie; strides in bytes.
struct Layer {
  const char* data;
  int64_t sequence_stride;
  int64_t token_stride;
  int64_t element_stride;
};

// The pooled rows of all layers: the four forms of hidden_states come down to this.
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

RowType row_type(const Tensor& hidden) {
  switch (hidden.scalar_type()) {
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
Layer layer_of(const Tensor& hidden, int64_t layer_dim, int64_t number, bool has_tokens) {
  const int64_t size = static_cast<int64_t>(hidden.element_size());
  const int64_t last = hidden.dim() - 1;
  const int64_t sequence_dim = layer_dim == 0 ? 1 : 0;
  const bool packed = has_tokens && hidden.dim() == 2;
  const int64_t offset = layer_dim < 0 ? 0 : number * hidden.stride(layer_dim);
  return {static_cast<const char*>(hidden.const_data_ptr()) + offset * size,
          packed ? 0 : hidden.stride(sequence_dim) * size, has_tokens ? hidden.stride(last - 1) * size : 0,
          hidden.stride(last) * size};
}

PooledRows pooled_rows(const std::vector<Tensor>& hidden_states, const std::optional<Tensor>& index) {
  STD_TORCH_CHECK(!hidden_states.empty(), "hidden_states must hold at least one layer");
  const Tensor& first = hidden_states[0];
  for (const Tensor& hidden : hidden_states) {
    STD_TORCH_CHECK(hidden.is_cpu() && hidden.scalar_type() == first.scalar_type() &&
                        hidden.dim() == first.dim() &&
                        std::equal(hidden.sizes().begin(), hidden.sizes().end(), first.sizes().begin()),
                    "hidden_states must be CPU tensors of one dtype and one shape");
  }
  PooledRows rows;
  rows.type = row_type(first);
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
  check_dense("index", *index, ScalarType::Long, {rows.sequences});
  rows.index = index->const_data_ptr<int64_t>();
  if (stacked) {
    for (int64_t l = 0; l < first.size(0); ++l) rows.layers.push_back(layer_of(first, 0, l, true));
  } else {
    for (const Tensor& hidden : hidden_states) rows.layers.push_back(layer_of(hidden, -1, 0, true));
  }
  return rows;
}

// A row whose elements lie apart, copied together.
const char* gather(const char* row, int64_t dim, int64_t element_size, int64_t element_stride, char* into) {
  for (int64_t i = 0; i < dim; ++i)
    std::memcpy(into + i * element_size, row + i * element_stride, element_size);
  return into;
}

// Scores and gate logits of up to kMaxRows sequences in one layer; all bits set is NaN in each of the row
// types.
void score_block(const PooledRows& rows, int64_t layer, int64_t first, const float* probe, const float* gate,
                 float bias, float gate_bias, float* scores, float* logits, char* pooled) {
  const int64_t layers = static_cast<int64_t>(rows.layers.size());
  const int64_t row_bytes = rows.dim * rows.element_size;
  const int64_t element_stride = rows.layers[layer].element_stride;
  const bool scattered = element_stride != rows.element_size && rows.dim > 1;
  std::vector<char> together(scattered ? kMaxRows * row_bytes : 0);
  const void* present[kMaxRows];
  int64_t place[kMaxRows];
  int count = 0;
  for (int64_t b = first; b < std::min(first + kMaxRows, rows.sequences); ++b) {
    const int64_t at = b * layers + layer;
    const char* row = rows.row(layer, b);
    if (row != nullptr && scattered) {
      row = gather(row, rows.dim, rows.element_size, element_stride, together.data() + count * row_bytes);
    }
    if (pooled != nullptr && row != nullptr) std::memcpy(pooled + at * row_bytes, row, row_bytes);
    if (pooled != nullptr && row == nullptr) std::memset(pooled + at * row_bytes, 0xff, row_bytes);
    if (row == nullptr) {
      scores[at] = logits[at] = kNaN;
    } else {
      place[count] = at;
      present[count++] = row;
    }
  }
  float block_scores[kMaxRows];
  float block_logits[kMaxRows] = {};
  if (count > 0)
    REPRDPO_PICK(dots)(rows.type, present, count, rows.dim, probe, gate, block_scores, block_logits);
  for (int r = 0; r < count; ++r) {
    scores[place[r]] = block_scores[r] + bias;
    logits[place[r]] = block_logits[r] + gate_bias;
  }
}

// In place: logits become softmax(logits).
void softmax(float* logits, int64_t count) {
  float most = -std::numeric_limits<float>::infinity();
  for (int64_t l = 0; l < count; ++l) most = logits[l] > most ? logits[l] : most;
  double total = 0;
  for (int64_t l = 0; l < count; ++l) {
    const double weight = std::exp(static_cast<double>(logits[l]) - most);
    logits[l] = static_cast<float>(weight);
    total += weight;
  }
  for (int64_t l = 0; l < count; ++l) logits[l] = static_cast<float>(logits[l] / total);
}

// gate[l] = sigmoid(sum_j V[l][j] scores[j] + c[l])
void vote(const float* weight, const float* bias, const float* scores, int64_t count, float* gate) {
  for (int64_t l = 0; l < count; ++l) {
    double logit = bias[l];
    for (int64_t j = 0; j < count; ++j) logit += static_cast<double>(weight[l * count + j]) * scores[j];
    gate[l] = static_cast<float>(1 / (1 + std::exp(-logit)));
  }
}

float mix(const float* gate, const float* scores, int64_t count) {
  double reward = 0;
  for (int64_t l = 0; l < count; ++l) reward += static_cast<double>(gate[l]) * scores[l];
  return static_cast<float>(reward);
}

}  // namespace
}  // namespace probe_reward

std::tuple<Tensor, Tensor, Tensor, Tensor> probe_reward_cpu(
    std::vector<Tensor> hidden_states, std::optional<Tensor> index, Tensor probe_weight, Tensor probe_bias,
    std::optional<Tensor> gate_weight, Tensor gate_bias, std::string gate, bool save_pooled) {
  using namespace probe_reward;
  const PooledRows rows = pooled_rows(hidden_states, index);
  const int64_t B = rows.sequences, L = static_cast<int64_t>(rows.layers.size()), D = rows.dim;
  const bool is_softmax = gate == "softmax", is_vote = gate == "vote";
  STD_TORCH_CHECK(is_softmax || is_vote || gate == "static", "gate must be softmax, static or vote");
  STD_TORCH_CHECK(gate_weight.has_value() == (is_softmax || is_vote), "gate_weight does not fit the gate");
  check_dense("probe_weight", probe_weight, ScalarType::Float, {L, D});
  check_dense("probe_bias", probe_bias, ScalarType::Float, {L});
  check_dense("gate_bias", gate_bias, ScalarType::Float, {L});
  if (gate_weight.has_value())
    check_dense("gate_weight", *gate_weight, ScalarType::Float, {L, is_vote ? L : D});

  Tensor reward = torch::stable::new_empty(probe_weight, {B});
  Tensor layer_scores = torch::stable::new_empty(probe_weight, {B, L});
  Tensor layer_gate = torch::stable::new_empty(probe_weight, {B, L});
  Tensor pooled = save_pooled ? torch::stable::new_empty(hidden_states[0], {B, L, D})
                              : torch::stable::new_empty(hidden_states[0], {0});

  const float* probe = probe_weight.const_data_ptr<float>();
  const float* bias = probe_bias.const_data_ptr<float>();
  const float* mixer = gate_weight.has_value() ? gate_weight->const_data_ptr<float>() : nullptr;
  const float* mixer_bias = gate_bias.const_data_ptr<float>();
  float* scores = layer_scores.mutable_data_ptr<float>();
  float* gates = layer_gate.mutable_data_ptr<float>();
  float* rewards = reward.mutable_data_ptr<float>();
  char* saved = save_pooled ? static_cast<char*>(pooled.mutable_data_ptr()) : nullptr;

  const int64_t blocks = (B + kMaxRows - 1) / kMaxRows;
  const int64_t block_bytes = D * (kMaxRows * rows.element_size + 2 * static_cast<int64_t>(sizeof(float)));
  parallel_for_each(L * blocks, block_bytes, [&](int64_t item) {
    const int64_t l = item / blocks;
    score_block(rows, l, item % blocks * kMaxRows, probe + l * D, is_softmax ? mixer + l * D : nullptr,
                bias[l], mixer_bias[l], scores, gates, saved);
  });

  std::vector<float> fixed(mixer_bias, mixer_bias + L);
  softmax(fixed.data(), L);
  const int64_t mix_bytes = static_cast<int64_t>(sizeof(float)) * (is_vote ? L * L : 8 * L);
  parallel_for_each(B, mix_bytes, [&](int64_t b) {
    float* gate_row = gates + b * L;
    if (is_softmax) softmax(gate_row, L);
    if (is_vote) vote(mixer, mixer_bias, scores + b * L, L, gate_row);
    if (!is_softmax && !is_vote) std::copy(fixed.begin(), fixed.end(), gate_row);
    rewards[b] = mix(gate_row, scores + b * L, L);
  });
  return {reward, layer_scores, layer_gate, pooled};
}

}  // namespace reprdpo
