// The softmax over rows of logits that lie in memory; compiled once for each CPU capability.
#include "logprob/kernel_parts.h"

namespace reprdpo::logprob::REPRDPO_CAPABILITY {
namespace {

float highest_of(Vec lanes) {
  float value[Vec::kWidth];
  lanes.store(value);
  float highest = value[0];
  for (int i = 1; i < Vec::kWidth; ++i) highest = value[i] > highest ? value[i] : highest;
  return highest;
}

template <typename T>
float highest_of(const T* from, int64_t count) {
  Vec highest = Vec::broadcast(-kInfinity);
  for (int64_t i = 0; i < count; i += Vec::kWidth) {
    highest = Vec::max(load_up_to(from + i, count - i, -kInfinity), highest);
  }
  return highest_of(highest);
}

// Sum of exp(scale u - most).
template <typename T>
double sum_exponentials(const T* u, int64_t count, float scale, float most) {
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kChunk) {
    const int64_t end = smaller(begin + kChunk, count);
    Vec sum = Vec::zero();
    for (int64_t i = begin; i < end; i += Vec::kWidth) {
      const Vec z = load_up_to(u + i, end - i, -kInfinity) * Vec::broadcast(scale);
      sum = sum + exp_nonpositive(z - Vec::broadcast(most));
    }
    total += sum.sum();
  }
  return total;
}

void logprob_row(Element type, const void* u, int64_t count, int64_t label, float scale, RowStats* stats) {
  with_type(type, [&](auto element) {
    const auto* row = static_cast<const decltype(element)*>(u);
    stats->most = highest_of(row, count) * scale;
    stats->target = label < 0 ? 0 : to_float(row[label]) * scale;
    // The label is passed over, not subtracted.
    const int64_t before = label < 0 ? count : label, after = label < 0 ? count : label + 1;
    stats->sum = sum_exponentials(row, before, scale, stats->most) +
                 sum_exponentials(row + after, count - after, scale, stats->most);
  });
}

void logprob_row_backward(Element type, const void* u, int64_t count, int64_t label, float scale, float most,
                          float factor, float label_gradient, void* out) {
  with_type(type, [&](auto element) {
    using T = decltype(element);
    const T* row = static_cast<const T*>(u);
    T* to = static_cast<T*>(out);
    for (int64_t i = 0; i < count; i += Vec::kWidth) {
      const Vec z = load_up_to(row + i, count - i) * Vec::broadcast(scale);
      store_up_to(exp_nonpositive(z - Vec::broadcast(most)) * Vec::broadcast(factor), to + i, count - i);
    }
    if (label >= 0) from_float(label_gradient, to + label);
  });
}

}  // namespace

const RowKernels& row_kernels() {
  static constexpr RowKernels kernels{logprob_row, logprob_row_backward};
  return kernels;
}

}  // namespace reprdpo::logprob::REPRDPO_CAPABILITY
