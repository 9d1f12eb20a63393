// What the ops over tokens take and return, one definition for logits that exist and logits that do not.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>

#include "common/checks.h"
#include "logprob/logprob.h"

namespace reprdpo::logprob {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Above this distance of a label from the maximum exp(m - z_y) is left alone, lest it overflow.
constexpr double kFarGap = 40;

inline Element element_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Element::kFloat;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kHalf;
    default:
      STD_TORCH_CHECK(false, "a tensor of log-prob ops must be float32, bfloat16 or float16");
  }
}

inline Transform transform_of(double logit_scale, std::optional<double> softcap, double temperature) {
  if (!softcap.has_value()) return {static_cast<float>(logit_scale / temperature), 0};
  return {static_cast<float>(logit_scale / *softcap), static_cast<float>(*softcap / temperature)};
}

inline void check_rows(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 2 && (tensor.size(1) <= 1 || tensor.stride(1) == 1),
                  name, " must be a CPU matrix whose rows are contiguous");
}

inline Rows rows_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), element_of(tensor.scalar_type()), tensor.stride(0), tensor.size(1)};
}

// The bias in float, or an empty tensor.
inline Tensor bias_of(const std::optional<Tensor>& bias, int64_t vocabulary, const Tensor& like) {
  if (!bias.has_value()) return torch::stable::new_empty(like, {0}, ScalarType::Float);
  check_shape("bias", *bias, {vocabulary});
  return torch::stable::contiguous(torch::stable::to(*bias, ScalarType::Float));
}

inline float log_prob(double most, double target, double sum_other) {
  const double gap = most - target;
  if (gap < kFarGap) return static_cast<float>(-std::log1p(sum_other * std::exp(gap)));
  return static_cast<float>(-gap - std::log(sum_other + std::exp(-gap)));
}

// Outputs by token: log-prob, [3, n] of max z, S_-y and S, and what else is asked for.
struct TokenOutputs {
  Tensor logp, row_stats, entropy, top1, mean_logit;
  int64_t tokens, vocabulary;
  Wanted wanted;

  TokenOutputs(const Tensor& like, int64_t tokens, int64_t vocabulary, Wanted wanted)
      : logp(torch::stable::new_empty(like, {tokens}, ScalarType::Float)),
        row_stats(torch::stable::new_empty(like, {3, tokens}, ScalarType::Float)),
        entropy(torch::stable::new_empty(like, {wanted.entropy ? tokens : 0}, ScalarType::Float)),
        top1(torch::stable::new_empty(like, {wanted.stats ? tokens : 0}, ScalarType::Float)),
        mean_logit(torch::stable::new_empty(like, {wanted.stats ? tokens : 0}, ScalarType::Float)),
        tokens(tokens),
        vocabulary(vocabulary),
        wanted(wanted) {}

  // A label that names no logit gives NaN in log p and in S_-y, of which the gradient is a multiple.
  void set(int64_t token, bool has_label, const RowStats& row) {
    const double below = has_label ? std::exp(static_cast<double>(row.target) - row.most) : 0;
    const double sum = row.sum + below;
    float* stats = row_stats.mutable_data_ptr<float>() + token;
    stats[0] = row.most;
    stats[tokens] = has_label ? static_cast<float>(row.sum) : kNaN;
    stats[2 * tokens] = static_cast<float>(sum);
    logp.mutable_data_ptr<float>()[token] = has_label ? log_prob(row.most, row.target, row.sum) : kNaN;
    if (wanted.entropy) {
      const double label_entr = below > 0 ? below * (static_cast<double>(row.target) - row.most) : 0;
      const double entr = (row.entr + label_entr) / sum;
      entropy.mutable_data_ptr<float>()[token] = static_cast<float>(std::log(sum) - entr);
    }
    if (!wanted.stats) return;
    const bool hit = has_label && row.leads && row.target == row.most;
    top1.mutable_data_ptr<float>()[token] = hit ? 1.0f : 0.0f;
    mean_logit.mutable_data_ptr<float>()[token] =
        static_cast<float>(row.total / static_cast<double>(vocabulary));
  }
};

using TokenResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

}  // namespace reprdpo::logprob
