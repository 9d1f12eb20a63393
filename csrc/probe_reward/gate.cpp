#include "probe_reward/gate.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace reprdpo::probe_reward {
namespace {

double sigmoid(double logit) { return 1 / (1 + std::exp(-logit)); }

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

}  // namespace

float mix(const Mixer& mixer, const float* scores, float* gate) {
  const int64_t L = mixer.layers;
  if (mixer.gate == Gate::kStatic) std::copy(mixer.bias, mixer.bias + L, gate);
  if (mixer.gate != Gate::kVote) softmax(gate, L);
  for (int64_t l = 0; mixer.gate == Gate::kVote && l < L; ++l) {
    double logit = mixer.bias[l];
    for (int64_t j = 0; j < L; ++j) logit += static_cast<double>(mixer.vote_weight[l * L + j]) * scores[j];
    gate[l] = static_cast<float>(sigmoid(logit));
  }
  double reward = 0;
  for (int64_t l = 0; l < L; ++l) reward += static_cast<double>(gate[l]) * scores[l];
  return static_cast<float>(reward);
}

void confidence(const Confidence& options, const float* reward, int64_t pairs, float* gamma) {
  double total = 0;
  for (int64_t p = 0; p < pairs; ++p) {
    double chosen = reward[p], rejected = reward[pairs + p];
    if (options.squash) chosen = sigmoid(chosen), rejected = sigmoid(rejected);
    double value = sigmoid(options.alpha * (chosen - rejected));
    if (options.floor.has_value() && value < *options.floor) value = *options.floor;
    gamma[p] = static_cast<float>(value);
    total += value;
  }
  if (options.reduce_batch) std::fill(gamma, gamma + pairs, static_cast<float>(total / pairs));
}

void slopes(const Mixer& mixer, const Upstream& upstream, int64_t b, const float* scores, const float* gate,
            float* score_slope, float* logit_slope) {
  const int64_t L = mixer.layers;
  const double grad_reward = upstream.reward.at(b, 0);
  const auto by_gate = [&](int64_t l) { return grad_reward * scores[l] + upstream.gate.at(b, l); };
  double mean = 0;
  for (int64_t l = 0; mixer.gate != Gate::kVote && l < L; ++l) mean += gate[l] * by_gate(l);
  std::vector<double> by_score(L);
  for (int64_t l = 0; l < L; ++l) {
    const double g = gate[l];
    by_score[l] = grad_reward * g + upstream.scores.at(b, l);
    logit_slope[l] =
        static_cast<float>(mixer.gate == Gate::kVote ? g * (1 - g) * by_gate(l) : g * (by_gate(l) - mean));
  }
  for (int64_t j = 0; mixer.gate == Gate::kVote && j < L; ++j) {
    for (int64_t l = 0; l < L; ++l) {
      by_score[l] += static_cast<double>(logit_slope[j]) * mixer.vote_weight[j * L + l];
    }
  }
  std::transform(by_score.begin(), by_score.end(), score_slope,
                 [](double slope) { return static_cast<float>(slope); });
}

}  // namespace reprdpo::probe_reward
