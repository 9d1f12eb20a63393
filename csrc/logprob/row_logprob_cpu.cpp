#include "common/cpu_capability.h"
#include "common/parallel.h"
#include "logprob/logprob.h"
#include "logprob/token_outputs.h"
#include "ops.h"

namespace reprdpo {
namespace logprob {
namespace {

const RowKernels& kernels() { return REPRDPO_PICK(row_kernels)(); }

int64_t label_or_none(int64_t label, int64_t vocabulary) {
  return label >= 0 && label < vocabulary ? label : -1;
}

}  // namespace
}  // namespace logprob

std::tuple<Tensor, Tensor> logprob_cpu(Tensor logits, Tensor labels, double temperature,
                                       int64_t ignore_index) {
  using namespace logprob;
  check_rows("logits", logits);
  const int64_t n = logits.size(0), V = logits.size(1);
  check_dense("labels", labels, ScalarType::Long, {n});
  TokenOutputs out(logits, n, V, {false, false, false});
  const Element type = element_of(logits.scalar_type());
  const int64_t row_bytes = logits.stride(0) * static_cast<int64_t>(logits.element_size());
  const char* from = static_cast<const char*>(logits.const_data_ptr());
  const int64_t* label_at = labels.const_data_ptr<int64_t>();
  float* logp = out.logp.mutable_data_ptr<float>();
  float* stats = out.row_stats.mutable_data_ptr<float>();
  parallel_for_each(n, row_bytes, [&](int64_t i) {
    if (label_at[i] == ignore_index) {
      logp[i] = stats[i] = stats[n + i] = stats[2 * n + i] = 0;
      return;
    }
    const int64_t label = label_or_none(label_at[i], V);
    RowStats row{};
    kernels().logprob_row(type, from + i * row_bytes, V, label, static_cast<float>(1 / temperature), &row);
    out.set(i, label >= 0, row);
  });
  return {out.logp, out.row_stats};
}

void logprob_backward_cpu(Tensor grad_logp, Tensor logits, Tensor labels, Tensor row_stats,
                          double temperature, int64_t ignore_index, Tensor out) {
  using namespace logprob;
  check_rows("logits", logits);
  check_rows("out", out);
  const int64_t n = logits.size(0), V = logits.size(1);
  check_shape("out", out, {n, V});
  STD_TORCH_CHECK(out.scalar_type() == logits.scalar_type(), "out must be of the logits' dtype");
  check_dense("grad_logp", grad_logp, ScalarType::Float, {n});
  check_dense("labels", labels, ScalarType::Long, {n});
  check_dense("row_stats", row_stats, ScalarType::Float, {3, n});
  const Element type = element_of(logits.scalar_type());
  const int64_t element_size = static_cast<int64_t>(logits.element_size());
  const int64_t from_bytes = logits.stride(0) * element_size, to_bytes = out.stride(0) * element_size;
  const char* from = static_cast<const char*>(logits.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t* label_at = labels.const_data_ptr<int64_t>();
  const float* upstream = grad_logp.const_data_ptr<float>();
  const float* stats = row_stats.const_data_ptr<float>();
  parallel_for_each(n, 2 * V * element_size, [&](int64_t i) {
    if (label_at[i] == ignore_index) {
      std::memset(to + i * to_bytes, 0, static_cast<size_t>(V * element_size));
      return;
    }
    const int64_t label = label_or_none(label_at[i], V);
    // Kept apart from the sums: 1 / S, by which both terms are scaled, is at most 1.
    const double per_sum = label < 0 ? kNaN : upstream[i] / (stats[2 * n + i] * temperature);
    kernels().logprob_row_backward(type, from + i * from_bytes, V, label, static_cast<float>(1 / temperature),
                                   stats[i], static_cast<float>(-per_sum),
                                   static_cast<float>(per_sum * stats[n + i]), to + i * to_bytes);
  });
}

}  // namespace reprdpo
