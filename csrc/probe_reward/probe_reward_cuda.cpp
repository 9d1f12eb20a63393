#include "probe_reward/probe_reward_cuda.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/arrivals.h"
#include "common/checks.h"
#include "ops.h"
#include "probe_reward/gate.h"
#include "probe_reward/states.h"

namespace reprdpo {
namespace probe_reward {
namespace {

void check(const char* error, const char* doing) {
  STD_TORCH_CHECK(error == nullptr, "probe_reward, ", doing, ": ", error);
}

// The current stream of a tensor's device, which is the current device while this lives.
struct Place {
  explicit Place(const Tensor& tensor) : device(tensor.get_device_index()), guard(device) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  }

  int32_t device;
  torch::stable::accelerator::DeviceGuard guard;
  AllowedInCapture allowed;
  CudaStream stream = nullptr;
};

int multiprocessors(int device) {
  static std::mutex mutex;
  static std::map<int, int> known;
  const std::lock_guard lock(mutex);
  int& count = known[device];
  if (count == 0) check(multiprocessors_of(device, &count), "counting multiprocessors");
  return count;
}

// Counters for the launches over `layers`, and the tensor that holds them where they are not the device's
// own: these are all given out, or are not zero from one launch to the next, between which another thread's
// may come.
std::pair<unsigned*, std::optional<Tensor>> take_arrivals(const Place& place, int64_t count, int64_t layers,
                                                          const Tensor& like) {
  static Arrivals arrivals(kArrivals);
  bool capturing = false;
  check(is_capturing(place.stream, &capturing), "asking whether the stream is captured");
  const auto start =
      layers <= kMaxLayers ? arrivals.take(place.device, place.stream, capturing, count) : std::nullopt;
  if (start.has_value()) {
    unsigned* first = nullptr;
    check(arrivals_of_device(&first), "finding the counters");
    return {first + *start, std::nullopt};
  }
  Tensor counters = torch::stable::new_empty(like, {count}, ScalarType::Int);
  check(clear(counters.mutable_data_ptr(), count * sizeof(unsigned), place.stream), "clearing counters");
  return {static_cast<unsigned*>(counters.mutable_data_ptr()), counters};
}

// Layers that lie alike, so that one set of strides serves all. Others are copied together first.
std::vector<Tensor> alike(std::vector<Tensor> hidden_states) {
  const auto lies_like_first = [&](const Tensor& hidden) {
    for (int64_t d = 0; d < hidden.dim(); ++d) {
      if (hidden.size(d) > 1 && hidden.stride(d) != hidden_states[0].stride(d)) return false;
    }
    return true;
  };
  if (!std::all_of(hidden_states.begin(), hidden_states.end(), lies_like_first)) {
    for (Tensor& hidden : hidden_states) hidden = torch::stable::contiguous(hidden);
  }
  return hidden_states;
}

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Sequences a block takes: as many as share the weights' read while most multiprocessors still have a block.
int rows_of_a_block(int64_t B, int64_t L, bool vectors, int multiprocessors) {
  int rows = vectors ? kMaxDeviceRows : 1;
  while (rows > 1 && (rows > B || (B + rows - 1) / rows * L < 3 * multiprocessors / 4)) rows /= 2;
  return rows;
}

void check_sizes(int64_t B, int64_t L, int64_t D) {
  STD_TORCH_CHECK(D < std::numeric_limits<int>::max() / 2 && L < std::numeric_limits<int>::max() / 2 &&
                      (B + 1) * L * (D / 256 + 1) < std::numeric_limits<int>::max(),
                  "probe_reward has more (sequence, layer) pairs than one launch takes");
}

}  // namespace
}  // namespace probe_reward

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> probe_reward_cuda(
    std::vector<Tensor> hidden_states, std::optional<Tensor> index, Tensor probe_weight, Tensor probe_bias,
    std::optional<Tensor> gate_weight, Tensor gate_bias, std::string gate, bool save_pooled,
    std::optional<double> alpha, bool squash, std::optional<double> floor, bool reduce_batch) {
  using namespace probe_reward;
  STD_TORCH_CHECK(probe_weight.is_cuda(), "probe_weight must be a CUDA tensor");
  const Place place(probe_weight);
  hidden_states = alike(std::move(hidden_states));
  const PooledRows rows = pooled_rows(hidden_states, index);
  STD_TORCH_CHECK(hidden_states[0].is_cuda(), "hidden_states must be CUDA tensors");
  const int64_t B = rows.sequences, L = static_cast<int64_t>(rows.layers.size()), D = rows.dim;
  check_sizes(B, L, D);
  const Gate kind = gate_named(gate);
  check_weights(kind, probe_weight, gate_weight, L, D, true);
  check_dense("probe_bias", probe_bias, ScalarType::Float, {L}, true);
  check_dense("gate_bias", gate_bias, ScalarType::Float, {L}, true);
  const auto asked = confidence_options(alpha, squash, floor, reduce_batch, B);

  // Of no layers the reward is 0.
  Tensor reward =
      L > 0 ? torch::stable::new_empty(probe_weight, {B}) : torch::stable::new_zeros(probe_weight, {B});
  Tensor layer_scores = torch::stable::new_empty(probe_weight, {B, L});
  Tensor layer_gate = torch::stable::new_empty(probe_weight, {B, L});
  Tensor pooled = save_pooled ? torch::stable::new_empty(hidden_states[0], {B, L, D})
                              : torch::stable::new_empty(hidden_states[0], {0});
  Tensor gamma = torch::stable::new_empty(probe_weight, {asked.has_value() ? B / 2 : 0});
  if (L == 0) torch::stable::fill_(gamma, std::max(0.5, floor.value_or(0)));
  if (B == 0 || L == 0) return {reward, layer_scores, layer_gate, pooled, gamma};

  ForwardArguments a = {};
  const Layer& first = rows.layers[0];
  const int64_t size = rows.element_size;
  a.sequence_stride = B > 1 ? first.sequence_stride / size : 0;
  a.token_stride = rows.tokens > 1 ? first.token_stride / size : 0;
  a.element_stride = D > 1 ? first.element_stride / size : 1;
  a.at = {rows.index, rows.tokens};
  a.probe_weight = probe_weight.const_data_ptr<float>();
  a.probe_bias = probe_bias.const_data_ptr<float>();
  a.gate_weight = data_or_null(gate_weight);
  a.gate_bias = gate_bias.const_data_ptr<float>();
  a.reward = reward.mutable_data_ptr<float>();
  a.scores = layer_scores.mutable_data_ptr<float>();
  a.gate_values = layer_gate.mutable_data_ptr<float>();
  a.pooled = save_pooled ? pooled.mutable_data_ptr() : nullptr;
  if (asked.has_value()) {
    a.confidence = {gamma.mutable_data_ptr<float>(),
                    static_cast<float>(asked->alpha),
                    static_cast<float>(asked->floor.value_or(0)),
                    squash,
                    floor.has_value(),
                    reduce_batch};
  }
  a.B = B;
  a.D = static_cast<int>(D);
  a.L = static_cast<int>(L);
  a.gate = kind;

  bool vectors = a.element_stride == 1 && D * size % 16 == 0 && a.sequence_stride * size % 16 == 0 &&
                 a.token_stride * size % 16 == 0 && is_aligned(a.probe_weight) && is_aligned(a.pooled) &&
                 (kind != Gate::kSoftmax || is_aligned(a.gate_weight));
  for (const Layer& layer : rows.layers) vectors = vectors && is_aligned(layer.data);
  const int block_rows = rows_of_a_block(B, L, vectors, multiprocessors(place.device));
  const auto [arrivals, held] = take_arrivals(place, (B + block_rows - 1) / block_rows + 1, L, probe_weight);
  a.arrivals = arrivals;
  for (int64_t l = 0; l < L; l += kMaxLayers) {
    a.first_layer = static_cast<int>(l);
    a.launch_layers = static_cast<int>(std::min<int64_t>(kMaxLayers, L - l));
    for (int i = 0; i < a.launch_layers; ++i) a.layers[i] = rows.layers[l + i].data;
    check(launch_forward(a, rows.type, vectors, block_rows, place.stream), "forward launch");
  }
  return {reward, layer_scores, layer_gate, pooled, gamma};
}

std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor> probe_reward_backward_cuda(
    std::optional<Tensor> grad_reward, std::optional<Tensor> grad_scores, std::optional<Tensor> grad_gate,
    std::optional<Tensor> pooled, std::optional<Tensor> index, Tensor probe_weight,
    std::optional<Tensor> gate_weight, Tensor layer_scores, Tensor layer_gate, std::string gate,
    std::vector<int64_t> hidden_shape, int64_t hidden_count, ScalarType hidden_dtype,
    std::vector<bool> needs) {
  using namespace probe_reward;
  STD_TORCH_CHECK(probe_weight.is_cuda(), "probe_weight must be a CUDA tensor");
  const Place place(probe_weight);
  const Gate kind = gate_named(gate);
  const BackwardShape shape = backward_shape(hidden_shape, hidden_count, index, layer_scores);
  const int64_t B = shape.B, L = shape.L, D = shape.D;
  check_sizes(B, L, D);
  const BackwardTensors given =
      check_backward(shape, kind, grad_reward, grad_scores, grad_gate, index, probe_weight, gate_weight,
                     layer_scores, layer_gate, needs, true);

  ParameterGradients grads = new_parameter_gradients(kind, L, D, pooled.has_value(), needs, probe_weight);
  std::vector<Tensor> hidden;
  for (int64_t i = 0; needs[0] && i < hidden_count; ++i) {
    hidden.push_back(torch::stable::new_empty(probe_weight, hidden_shape, hidden_dtype));
  }
  BackwardArguments a = {};
  a.at = {given.index, given.index != nullptr ? shape.tokens : 1};
  a.upstream = given.upstream;
  a.scores = given.scores;
  a.gate_values = given.gate;
  a.probe_weight = probe_weight.const_data_ptr<float>();
  a.gate_weight = given.gate_weight;
  a.probe_weight_grad = grads.probe_weight_data();
  a.gate_weight_grad = grads.gate_weight_data();
  a.probe_bias_grad = needs[2] ? grads.probe_bias.mutable_data_ptr<float>() : nullptr;
  a.gate_bias_grad = needs[4] ? grads.gate_bias.mutable_data_ptr<float>() : nullptr;
  a.B = B;
  a.D = static_cast<int>(D);
  a.L = static_cast<int>(L);
  a.gate = kind;

  const int64_t size = row_type(hidden_dtype) == RowType::kFloat ? 4 : 2;
  bool vectors = D * size % 16 == 0 && is_aligned(a.probe_weight) &&
                 (kind != Gate::kSoftmax || is_aligned(a.gate_weight));
  const bool asks_rows =
      a.probe_weight_grad != nullptr || (kind == Gate::kSoftmax && a.gate_weight_grad != nullptr);
  if (pooled.has_value() && asks_rows) {
    const PooledRows rows = pooled_rows({*pooled}, std::nullopt);
    STD_TORCH_CHECK(pooled->is_cuda() && pooled->scalar_type() == hidden_dtype && rows.sequences == B &&
                        static_cast<int64_t>(rows.layers.size()) == L && rows.dim == D,
                    "pooled has not the shape or dtype it must have");
    a.pooled = pooled->const_data_ptr();
    a.sequence_stride = pooled->stride(0);
    a.layer_stride = pooled->stride(1);
    a.element_stride = D > 1 ? pooled->stride(2) : 1;
    vectors = vectors && a.element_stride == 1 && a.sequence_stride * size % 16 == 0 &&
              a.layer_stride * size % 16 == 0 && is_aligned(a.pooled);
  }
  a.hidden_form = shape.pooled_rows ? HiddenForm::kPooled
                  : shape.packed    ? HiddenForm::kPacked
                                    : HiddenForm::kPadded;
  a.hidden_rows = shape.pooled_rows ? B : shape.packed ? shape.tokens : B * shape.tokens;
  a.hidden_row_stride = shape.pooled_rows ? L * D : D;
  const bool has_hidden = needs[0] && a.hidden_rows > 0 && D > 0;
  if (!has_hidden) a.hidden_rows = 0;
  const bool asks_parameters = needs[1] || needs[2] || needs[3] || needs[4];
  if (L == 0 || !(asks_parameters || has_hidden)) {
    return {hidden, grads.probe_weight, grads.probe_bias, grads.gate_weight, grads.gate_bias};
  }
  // From one layer to the next in the tensor that holds them all, where one does.
  const int64_t layer_bytes = (shape.pooled_rows ? D : shape.tokens * B * D) * size;
  for (int64_t l = 0; l < L; l += kMaxLayers) {
    a.first_layer = static_cast<int>(l);
    a.launch_layers = static_cast<int>(std::min<int64_t>(kMaxLayers, L - l));
    for (int i = 0; has_hidden && i < a.launch_layers; ++i) {
      char* data = static_cast<char*>(hidden[hidden_count == 1 ? 0 : l + i].mutable_data_ptr());
      a.hidden[i] = data + (shape.pooled_rows || shape.stacked ? (l + i) * layer_bytes : 0);
    }
    check(launch_backward(a, row_type(hidden_dtype), vectors, multiprocessors(place.device), place.stream),
          "backward launch");
  }
  return {hidden, grads.probe_weight, grads.probe_bias, grads.gate_weight, grads.gate_bias};
}

}  // namespace reprdpo
