// A residual's product with the weight from the elements that hold all but `mass` of its row's sum of
// magnitudes.
//
// With levels t_0 < ... < t_4, t_k = mass V^(k / 4 - 1), the largest one is taken under which the magnitudes
// sum to no more than the mass (t_0 always is), and then the largest of 128 steps up to the next. What is
// dropped never exceeds the mass; what is kept may be a few more than the fewest. A row with more than its
// list has room for is left to the dense product.
#pragma once

#include <cstdint>

#include "logprob/logprob.h"

namespace reprdpo::logprob {

constexpr int kMassLevels = 5;

struct MassLevels {
  double mass;
  float level[kMassLevels];
};

// Room for the kept elements of one token.
struct Entries {
  int32_t* column;
  float* value;
  int64_t room;
};

struct SparseKernels {
  int64_t panel_tokens;
  // The kept elements of `tokens` tokens, at most panel_tokens where the column stride is not 1, in the order
  // of their columns; a count of -1 where there is no room.
  void (*keep)(Element type, const void* residual, int64_t token_stride, int64_t column_stride,
               int64_t vocabulary, int64_t tokens, const MassLevels& levels, const Entries* kept,
               int64_t* counts);
  // How many columns sum_rows() takes at once.
  int64_t (*sum_columns)(Element type);
  // out[d] = scale sum_i value[i] weight[column[i]][d] for first <= d < first + columns; out is of the
  // weight's type. `next` is summed next: its first rows are asked for.
  void (*sum_rows)(const Rows& weight, int64_t first, int64_t columns, const Entries& kept, int64_t count,
                   const Entries& next, int64_t next_count, float scale, void* out);
};

#define REPRDPO_DECLARE_SPARSE(capability) \
  namespace capability {                   \
  const SparseKernels& sparse_kernels();   \
  }
REPRDPO_DECLARE_SPARSE(portable)
REPRDPO_DECLARE_SPARSE(avx2)
REPRDPO_DECLARE_SPARSE(avx512)
#undef REPRDPO_DECLARE_SPARSE

}  // namespace reprdpo::logprob
