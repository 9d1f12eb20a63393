// The representation reward: two dot products a (sequence, layer), mixed over the layers.
//
//   s[b][l] = w[l] . h[b][l] + b[l]      R[b] = sum_l g[b][l] s[b][l]
//   softmax: g = softmax_l(v[l] . h[b][l] + c[l])    static: g = softmax(c)    vote: g = sigmoid(V s + c)
//
// h[b][l] is the row that index[b] names in layer l. Every row is read once (B L D elements), every weight
// row once for each block of kMaxRows sequences, and no [B, L, D] is written unless it is asked for.
#pragma once

#include <cstdint>

namespace reprdpo::probe_reward {

// Rows that share one pass over the weights: enough accumulators to hide the latency of a multiply-add.
constexpr int kMaxRows = 4;

enum class RowType { kFloat, kBFloat16, kHalf };

// scores[r] = probe . rows[r], and logits[r] = gate . rows[r] unless gate is null, for r < count <= kMaxRows.
// Each row has `dim` elements of stride 1; sums are taken in float, 256 products at a time.
using DotsKernel = void (*)(RowType type, const void* const* rows, int count, int64_t dim, const float* probe,
                            const float* gate, float* scores, float* logits);

#define REPRDPO_DECLARE_DOTS(capability)                                                       \
  namespace capability {                                                                       \
  void dots(RowType type, const void* const* rows, int count, int64_t dim, const float* probe, \
            const float* gate, float* scores, float* logits);                                  \
  }
REPRDPO_DECLARE_DOTS(portable)
REPRDPO_DECLARE_DOTS(avx2)
REPRDPO_DECLARE_DOTS(avx512)
#undef REPRDPO_DECLARE_DOTS

}  // namespace reprdpo::probe_reward
