#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "common/checks.h"
#include "common/cpu_capability.h"
#include "common/parallel.h"
#include "ops.h"
#include "probe_reward/gate.h"
#include "probe_reward/probe_reward.h"
#include "probe_reward/states.h"

namespace reprdpo {
namespace probe_reward {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kFloatSize = sizeof(float);

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

// Rows whose sum goes into the weight gradients as one number, so that rounding grows with B / kGradRows.
constexpr int kGradRows = 8;
// Columns of the weight gradients that a thread sums at a time: they stay in its first-level cache.
constexpr int64_t kGradColumns = 2048;

// d and dz [B, L], zero where the index points nowhere.
struct Slopes {
  std::vector<float> score, logit;
};

// A gradient [L, D] and the slopes [B, L] that weight its rows; null where nobody asks.
struct WeightGradient {
  const float* slopes;
  float* grad;
};

// A stretch of columns of one layer's weight gradients; `second` may be null.
void add_layer(const PooledRows& rows, const char* present, int64_t l, int64_t begin, int64_t width,
               WeightGradient first, WeightGradient second) {
  const int64_t L = static_cast<int64_t>(rows.layers.size());
  const int64_t stride = rows.layers[l].element_stride, bytes = width * rows.element_size;
  const bool scattered = stride != rows.element_size;
  std::vector<char> together(scattered ? kGradRows * bytes : 0);
  const void* block[kGradRows];
  float weights[kGradRows], second_weights[kGradRows];
  float* sum = first.grad + l * rows.dim + begin;
  float* second_sum = second.grad != nullptr ? second.grad + l * rows.dim + begin : nullptr;
  std::fill(sum, sum + width, 0.0f);
  if (second_sum != nullptr) std::fill(second_sum, second_sum + width, 0.0f);
  int count = 0;
  const auto flush = [&] {
    REPRDPO_PICK(add_rows)
    (rows.type, block, count, width, weights, second_sum != nullptr ? second_weights : nullptr, sum,
     second_sum);
    count = 0;
  };
  for (int64_t b = 0; b < rows.sequences; ++b) {
    if (!present[b]) continue;
    const char* row = rows.row(l, b) + begin * stride;
    if (scattered) row = gather(row, width, rows.element_size, stride, together.data() + count * bytes);
    weights[count] = first.slopes[b * L + l];
    if (second_sum != nullptr) second_weights[count] = second.slopes[b * L + l];
    block[count++] = row;
    if (count == kGradRows) flush();
  }
  if (count > 0) flush();
}

void add_layers(const PooledRows& rows, const char* present, WeightGradient probe, WeightGradient gate) {
  const int64_t chunks = (rows.dim + kGradColumns - 1) / kGradColumns;
  const int64_t bytes = std::min(rows.dim, kGradColumns) * (rows.sequences * rows.element_size + kFloatSize);
  if (probe.grad == nullptr) std::swap(probe, gate);
  if (probe.grad == nullptr) return;
  parallel_for_each(static_cast<int64_t>(rows.layers.size()) * chunks, bytes, [&](int64_t item) {
    const int64_t begin = item % chunks * kGradColumns;
    add_layer(rows, present, item / chunks, begin, std::min(kGradColumns, rows.dim - begin), probe, gate);
  });
}

// grad[l] = sum over the sequences of slopes[b][l], where it is asked for.
void sum_sequences(const std::vector<float>& slopes, int64_t L, float* grad) {
  std::vector<double> total(L);
  for (size_t i = 0; i < slopes.size(); ++i) total[i % L] += slopes[i];
  std::transform(total.begin(), total.end(), grad, [](double sum) { return static_cast<float>(sum); });
}

// dV[l][j] = sum_b dz[b][l] s[b][j]
void vote_gradient(const Slopes& slopes, const float* scores, const char* present, int64_t B, int64_t L,
                   float* grad) {
  parallel_for_each(L, B * L * kFloatSize, [&](int64_t l) {
    std::vector<double> total(L);
    for (int64_t b = 0; b < B; ++b) {
      if (!present[b]) continue;
      const double slope = slopes.logit[b * L + l];
      for (int64_t j = 0; j < L; ++j) total[j] += slope * scores[b * L + j];
    }
    std::transform(total.begin(), total.end(), grad + l * L,
                   [](double sum) { return static_cast<float>(sum); });
  });
}

// The sequences that read one row of a layer: only packed states let there be more than one, and the first
// writes for all.
std::vector<std::vector<int64_t>> readers(const BackwardShape& shape, const int64_t* index,
                                          const char* present) {
  std::vector<std::vector<int64_t>> by_first;
  std::unordered_map<int64_t, size_t> seen;
  for (int64_t b = 0; b < shape.B; ++b) {
    if (!present[b]) continue;
    if (shape.packed) {
      const auto [at, is_new] = seen.try_emplace(index[b], by_first.size());
      if (!is_new) {
        by_first[at->second].push_back(b);
        continue;
      }
    }
    by_first.push_back({b});
  }
  return by_first;
}

// The hidden states' gradients, zero but at the pooled rows.
std::vector<Tensor> hidden_gradients(const BackwardShape& shape, const std::vector<int64_t>& hidden_shape,
                                     int64_t count, ScalarType dtype, const int64_t* index,
                                     const char* present, const Slopes& slopes, const Tensor& like,
                                     const float* probe, const float* gate) {
  std::vector<Tensor> grads;
  for (int64_t i = 0; i < count; ++i) grads.push_back(torch::stable::new_zeros(like, hidden_shape, dtype));
  const int64_t L = shape.L, D = shape.D;
  const auto rows = readers(shape, index, present);
  const RowType type = row_type(dtype);
  const int64_t row_bytes = D * (type == RowType::kFloat ? 4 : 2);
  const int64_t total = static_cast<int64_t>(rows.size());
  std::vector<char*> data;
  for (Tensor& grad : grads) data.push_back(static_cast<char*>(grad.mutable_data_ptr()));
  parallel_for_each(total * L, row_bytes + 2 * D * kFloatSize, [&](int64_t item) {
    const int64_t l = item / total, b = rows[item % total][0];
    const int64_t token = shape.pooled_rows ? l : index[b];
    const int64_t sequence = shape.packed ? 0 : shape.stacked ? l * shape.B + b : b;
    double d = 0, dz = 0;
    for (int64_t reader : rows[item % total]) {
      d += slopes.score[reader * L + l];
      dz += slopes.logit[reader * L + l];
    }
    const int64_t tensor = count == 1 ? 0 : l;
    REPRDPO_PICK(combine)
    (type, D, static_cast<float>(d), probe + l * D, static_cast<float>(dz),
     gate != nullptr ? gate + l * D : nullptr, data[tensor] + (sequence * shape.tokens + token) * row_bytes);
  });
  return grads;
}

}  // namespace
}  // namespace probe_reward

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> probe_reward_cpu(
    std::vector<Tensor> hidden_states, std::optional<Tensor> index, Tensor probe_weight, Tensor probe_bias,
    std::optional<Tensor> gate_weight, Tensor gate_bias, std::string gate, bool save_pooled,
    std::optional<double> alpha, bool squash, std::optional<double> floor, bool reduce_batch) {
  using namespace probe_reward;
  const PooledRows rows = pooled_rows(hidden_states, index);
  STD_TORCH_CHECK(hidden_states[0].is_cpu(), "hidden_states must be CPU tensors");
  const int64_t B = rows.sequences, L = static_cast<int64_t>(rows.layers.size()), D = rows.dim;
  const Gate kind = gate_named(gate);
  check_weights(kind, probe_weight, gate_weight, L, D, false);
  check_dense("probe_bias", probe_bias, ScalarType::Float, {L});
  check_dense("gate_bias", gate_bias, ScalarType::Float, {L});
  const auto asked = confidence_options(alpha, squash, floor, reduce_batch, B);

  Tensor reward = torch::stable::new_empty(probe_weight, {B});
  Tensor layer_scores = torch::stable::new_empty(probe_weight, {B, L});
  Tensor layer_gate = torch::stable::new_empty(probe_weight, {B, L});
  Tensor pooled = save_pooled ? torch::stable::new_empty(hidden_states[0], {B, L, D})
                              : torch::stable::new_empty(hidden_states[0], {0});
  Tensor gamma = torch::stable::new_empty(probe_weight, {asked.has_value() ? B / 2 : 0});

  const float* probe = probe_weight.const_data_ptr<float>();
  const float* bias = probe_bias.const_data_ptr<float>();
  const float* mixer_weight = data_or_null(gate_weight);
  const float* mixer_bias = gate_bias.const_data_ptr<float>();
  float* scores = layer_scores.mutable_data_ptr<float>();
  float* gates = layer_gate.mutable_data_ptr<float>();
  float* rewards = reward.mutable_data_ptr<float>();
  char* saved = save_pooled ? static_cast<char*>(pooled.mutable_data_ptr()) : nullptr;

  const int64_t blocks = (B + kMaxRows - 1) / kMaxRows;
  const int64_t block_bytes = D * (kMaxRows * rows.element_size + 2 * kFloatSize);
  parallel_for_each(L * blocks, block_bytes, [&](int64_t item) {
    const int64_t l = item / blocks;
    score_block(rows, l, item % blocks * kMaxRows, probe + l * D,
                kind == Gate::kSoftmax ? mixer_weight + l * D : nullptr, bias[l], mixer_bias[l], scores,
                gates, saved);
  });

  const Mixer mixer{kind, L, mixer_weight, mixer_bias};
  const int64_t mix_bytes = kFloatSize * (kind == Gate::kVote ? L * L : 8 * L);
  parallel_for_each(B, mix_bytes, [&](int64_t b) { rewards[b] = mix(mixer, scores + b * L, gates + b * L); });
  if (asked.has_value()) confidence(*asked, rewards, B / 2, gamma.mutable_data_ptr<float>());
  return {reward, layer_scores, layer_gate, pooled, gamma};
}

std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor> probe_reward_backward_cpu(
    std::optional<Tensor> grad_reward, std::optional<Tensor> grad_scores, std::optional<Tensor> grad_gate,
    std::optional<Tensor> pooled, std::optional<Tensor> index, Tensor probe_weight,
    std::optional<Tensor> gate_weight, Tensor layer_scores, Tensor layer_gate, std::string gate,
    std::vector<int64_t> hidden_shape, int64_t hidden_count, ScalarType hidden_dtype,
    std::vector<bool> needs) {
  using namespace probe_reward;
  const Gate kind = gate_named(gate);
  const BackwardShape shape = backward_shape(hidden_shape, hidden_count, index, layer_scores);
  const int64_t B = shape.B, L = shape.L, D = shape.D;
  const BackwardTensors given =
      check_backward(shape, kind, grad_reward, grad_scores, grad_gate, index, probe_weight, gate_weight,
                     layer_scores, layer_gate, needs, false);

  std::vector<char> present(B, 1);
  for (int64_t b = 0; given.index != nullptr && b < B; ++b) {
    present[b] = given.index[b] >= 0 && given.index[b] < shape.tokens;
  }
  const Mixer mixer{kind, L, given.gate_weight, nullptr};
  Slopes by{std::vector<float>(B * L), std::vector<float>(B * L)};
  const int64_t slope_bytes = kFloatSize * (kind == Gate::kVote ? L * L : 8 * L);
  parallel_for_each(B, slope_bytes, [&](int64_t b) {
    if (!present[b]) return;
    slopes(mixer, given.upstream, b, given.scores + b * L, given.gate + b * L, by.score.data() + b * L,
           by.logit.data() + b * L);
  });

  ParameterGradients grads = new_parameter_gradients(kind, L, D, pooled.has_value(), needs, probe_weight);
  if (pooled.has_value()) {
    const PooledRows rows = pooled_rows({*pooled}, std::nullopt);
    STD_TORCH_CHECK(pooled->is_cpu() && rows.sequences == B &&
                        static_cast<int64_t>(rows.layers.size()) == L && rows.dim == D,
                    "pooled has not the shape it must have");
    add_layers(rows, present.data(), {by.score.data(), grads.probe_weight_data()},
               {by.logit.data(), kind == Gate::kSoftmax ? grads.gate_weight_data() : nullptr});
  }
  if (kind == Gate::kVote && needs[3]) {
    vote_gradient(by, given.scores, present.data(), B, L, grads.gate_weight_data());
  }
  if (needs[2]) sum_sequences(by.score, L, grads.probe_bias.mutable_data_ptr<float>());
  if (needs[4]) sum_sequences(by.logit, L, grads.gate_bias.mutable_data_ptr<float>());
  std::vector<Tensor> hidden;
  if (needs[0]) {
    hidden = hidden_gradients(shape, hidden_shape, hidden_count, hidden_dtype, given.index, present.data(),
                              by, probe_weight, probe_weight.const_data_ptr<float>(),
                              kind == Gate::kSoftmax ? given.gate_weight : nullptr);
  }
  return {hidden, grads.probe_weight, grads.probe_bias, grads.gate_weight, grads.gate_bias};
}

}  // namespace reprdpo
