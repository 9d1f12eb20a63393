// Log-probabilities of labels and the residual that both gradients of a head are products of.
//
//   u = h W^T     z = cap tanh(scale (u + b)) with a softcap, else scale (u + b)     m = max_j z_j
//   S_-y = sum over j != y of exp(z_j - m)     S = S_-y + exp(z_y - m)     log p_y = -log1p(S_-y exp(m -
//   z_y)) residual: G_y = 1, G_j = -exp(z_j - m) / S_-y for j != y, each times 1 - tanh^2 under a softcap
//
// S_-y is summed, never S - exp(z_y - m), so that nothing cancels as p_y goes to 1. An infinite or missing
// number in a row makes that row NaN and no other.
//
// The head's product and the softmax meet in blocks of kBlockRows vocabulary rows by a panel of tokens, the
// tokens side by side in a vector: block = W H^T with H packed once, each weight row broadcast as it lies in
// memory, so that maxima and sums need no reduction across a vector. Every block has its own maximum; blocks
// are merged in their order, which no number of threads changes.
#pragma once

#include <cstdint>

namespace reprdpo::logprob {

enum class Element { kFloat, kBFloat16, kHalf };

// A half's smallest normal number is 2^-14: its residuals are kept 2^12 times as large.
constexpr float kHalfResidualScale = 4096.0f;

constexpr int kBlockRows = 96;

// cap = 0: no softcap.
struct Transform {
  float scale;
  float cap;
};

struct Wanted {
  bool residual;
  bool entropy;
  bool stats;
};

// Rows of `depth` elements of stride 1, `stride` elements apart.
struct Rows {
  const void* data;
  Element type;
  int64_t stride;
  int64_t depth;
};

// What a block of logits is worth to a panel of tokens; each pointer leads to one number a token.
struct BlockStats {
  float* most;   // max z
  float* sum;    // of exp(z - most), the label left out
  float* entr;   // of exp(z - most) (z - most), the label left out
  float* total;  // of z
};

// The labels of a panel's tokens, -1 for none.
struct PanelLabels {
  const int64_t* label;
  float* target;  // z of the label
  float* leads;   // 1 where no earlier logit of its block is as large, 0 where one is
};

// Every pointer to logits leads to [kBlockRows][panel_columns] floats for each panel.
struct LinearKernels {
  int64_t panel_columns;
  // Bytes of a packed panel, and of kBlockRows rows in the form that multiply() reads.
  int64_t (*panel_bytes)(Element type, int64_t depth);
  int64_t (*scratch_bytes)(const Rows& rows);
  // Of what pack_groups() writes.
  int64_t (*group_bytes)(Element type, int64_t depth, int64_t columns);
  // panel[k][c] = rows[first + c][k] for c < count <= panel_columns, 0 beyond.
  void (*pack_rows)(const Rows& rows, int64_t first, int64_t count, void* panel);
  // panel[k][c] = scale[k] rows[k][first + c] for k < depth, rounded to bf16 where bf16 is multiplied as
  // such; without a scale the elements themselves.
  void (*pack_columns)(const Rows& rows, int64_t depth, const float* scale, int64_t first, int64_t count,
                       void* panel);
  // The transpose of rows[k][c] for k < depth and c < columns, as multiply_groups() reads it.
  void (*pack_groups)(const Rows& rows, int64_t depth, int64_t columns, void* groups);
  // logits[p][r][c] = sum_k rows[first + r][k] panels[p][k][c] for r < count <= kBlockRows and all `columns`.
  void (*multiply)(const Rows& rows, int64_t first, int64_t count, const void* panels, int64_t columns,
                   void* scratch, float* logits);
  // sums[r][c] (+)= sum_k groups[k][r] panel[k][c]; of sums [count in sixes][panel_columns] unless `first`.
  void (*multiply_groups)(Element type, const void* groups, int64_t count, int64_t depth, const void* panel,
                          bool first, int64_t columns, float* sums);
  // Logits of vocabulary rows [first, first + count) by `columns` tokens of one panel; they become
  // exp(z - most), times 1 - tanh^2 under a softcap, where the residual is wanted. bias is null or [count].
  void (*softmax_block)(float* logits, int64_t first, int64_t count, int64_t columns, const float* bias,
                        Transform transform, Wanted wanted, PanelLabels labels, BlockStats stats);
  // All blocks of a panel into one; block b's numbers lie b * stride further. Where the residual is wanted a
  // block's sum becomes the factor of its residuals, -exp(most of the block - most) / S_-y.
  void (*merge_blocks)(int64_t blocks, int64_t stride, int64_t columns, Wanted wanted,
                       BlockStats blocks_stats, BlockStats merged);
  // residual[r][c] for the rows and columns of a block, `stride` elements from one vocabulary row to the
  // next.
  void (*residual_block)(const float* logits, int64_t first, int64_t count, int64_t columns,
                         const float* factor, Transform transform, PanelLabels labels, Element type,
                         void* residual, int64_t stride);
  // out[r][c] (+)= scale[r] logits[r][c] for r < count, c < columns; no scale is 1.
  void (*store_block)(const float* logits, int64_t count, int64_t columns, const float* scale,
                      bool accumulate, Element type, void* out, int64_t stride);
};

// One row of logits; the label is left out of sum and entr, and -1 stands for none.
struct RowStats {
  float most;
  double sum;
  double entr;
  double total;
  float target;
  bool leads;
};

struct RowKernels {
  // Of z = scale u.
  void (*logprob_row)(Element type, const void* u, int64_t count, int64_t label, float scale,
                      RowStats* stats);
  // out_j = factor exp(scale u_j - most) for j != label; out may be u.
  void (*logprob_row_backward)(Element type, const void* u, int64_t count, int64_t label, float scale,
                               float most, float factor, float label_gradient, void* out);
};

#define REPRDPO_DECLARE_LOGPROB(capability) \
  namespace capability {                    \
  const LinearKernels& linear_kernels();    \
  const RowKernels& row_kernels();          \
  }
REPRDPO_DECLARE_LOGPROB(portable)
REPRDPO_DECLARE_LOGPROB(avx2)
REPRDPO_DECLARE_LOGPROB(avx512)
REPRDPO_DECLARE_LOGPROB(avx512bf16)
#undef REPRDPO_DECLARE_LOGPROB

}  // namespace reprdpo::logprob
