// The small stage of the representation reward: [B, L] values, one sequence at a time, forward and backward.
#pragma once

#include <cstdint>
#include <optional>

#ifdef __CUDACC__
#define REPRDPO_HOST_DEVICE __host__ __device__
#else
#define REPRDPO_HOST_DEVICE
#endif

namespace reprdpo::probe_reward {

enum class Gate { kSoftmax, kStatic, kVote };

// Which gate, over how many layers; V [L, L] is read by the vote alone, c [L] by static and vote.
struct Mixer {
  Gate gate;
  int64_t layers;
  const float* vote_weight;
  const float* bias;
};

// Turns gate[l] from softmax's logits, or from anything for the other two, into g[l]; returns R.
float mix(const Mixer& mixer, const float* scores, float* gate);

// gamma[p] = sigma(alpha (R[p] - R[P + p])), of sigma(R) with squash; then at least floor; then the mean.
struct Confidence {
  double alpha;
  bool squash;
  std::optional<double> floor;
  bool reduce_batch;
};
void confidence(const Confidence& options, const float* reward, int64_t pairs, float* gamma);

// Values [B, L], or [B] with column 0, that may be expanded (a sum's upstream gradient is one number); null
// is zero.
struct Strided {
  const float* data;
  int64_t row, column;

  REPRDPO_HOST_DEVICE float at(int64_t b, int64_t l) const {
    return data == nullptr ? 0.0f : data[b * row + l * column];
  }
};

// What comes back from the reward [B], the scores and the gate [B, L].
struct Upstream {
  Strided reward, scores, gate;
};

// The derivatives by the scores and by the gate's logits of sequence b, d[l] and dz[l]. With u = dR s + dg:
//   softmax, static: dz = g (u - sum_l g u)    vote: dz = g (1 - g) u    d = dR g + ds (vote: + V^T dz)
void slopes(const Mixer& mixer, const Upstream& upstream, int64_t b, const float* scores, const float* gate,
            float* score_slope, float* logit_slope);

}  // namespace reprdpo::probe_reward
