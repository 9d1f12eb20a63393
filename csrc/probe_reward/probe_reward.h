// The representation reward: two dot products a (sequence, layer), mixed over the layers.
//
//   s[b][l] = w[l] . h[b][l] + b[l]      R[b] = sum_l g[b][l] s[b][l]
//   softmax: g = softmax_l(v[l] . h[b][l] + c[l])    static: g = softmax(c)    vote: g = sigmoid(V s + c)
//
// h[b][l] is the row that index[b] names in layer l. Every row is read once (B L D elements), every weight
// row once for each block of kMaxRows sequences, and no [B, L, D] is written unless it is asked for.
//
// Backward, with d and dz the derivatives by score and gate logit (see gate.h):
//   dw[l] = sum_b d[b][l] h[b][l]    dv[l] = sum_b dz[b][l] h[b][l]    dh[b][l] = d[b][l] w[l] + dz[b][l]
//   v[l]
// Every row is read once for both weight gradients.
#pragma once

#include <cstdint>

namespace reprdpo::probe_reward {

// Rows that share one pass over the weights: enough accumulators to hide the latency of a multiply-add.
constexpr int kMaxRows = 4;

enum class RowType { kFloat, kBFloat16, kHalf };

#define REPRDPO_DECLARE_KERNELS(capability)                                                                 \
  namespace capability {                                                                                    \
  /* scores[r] = probe . rows[r], and logits[r] = gate . rows[r] unless gate is null, for r < count <=      \
     kMaxRows. Each row has `dim` elements of stride 1; sums are taken in float, 256 products at a time. */ \
  void dots(RowType type, const void* const* rows, int count, int64_t dim, const float* probe,              \
            const float* gate, float* scores, float* logits);                                               \
  /* sum[i] += sum_r weight[r] rows[r][i], and other_sum with other_weight unless that is null. */          \
  void add_rows(RowType type, const void* const* rows, int count, int64_t dim, const float* weight,         \
                const float* other_weight, float* sum, float* other_sum);                                   \
  /* row[i] = d probe[i] + dz gate[i], rounded to `type`; gate may be null. */                              \
  void combine(RowType type, int64_t dim, float d, const float* probe, float dz, const float* gate,         \
               void* row);                                                                                  \
  }
REPRDPO_DECLARE_KERNELS(portable)
REPRDPO_DECLARE_KERNELS(avx2)
REPRDPO_DECLARE_KERNELS(avx512)
#undef REPRDPO_DECLARE_KERNELS

using DotsKernel = decltype(&portable::dots);
using AddRowsKernel = decltype(&portable::add_rows);
using CombineKernel = decltype(&portable::combine);

}  // namespace reprdpo::probe_reward
