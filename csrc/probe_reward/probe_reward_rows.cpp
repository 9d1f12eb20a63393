// The gradients of probe_reward, row by row; compiled once for each CPU capability (see common/simd.h).
#include "common/simd.h"
#include "probe_reward/probe_reward.h"

namespace reprdpo::probe_reward::REPRDPO_CAPABILITY {
namespace {

using reprdpo::REPRDPO_CAPABILITY::load_partial;
using reprdpo::REPRDPO_CAPABILITY::store_partial;
using reprdpo::REPRDPO_CAPABILITY::Vec;

// Vectors of one row taken together: enough sums to hide the latency of a multiply-add.
constexpr int kTogether = 4;

// Element i + k * kWidth of every row; the last vector has `count` elements where kVectors is 1.
template <typename T, int kVectors, bool kOther>
void add_columns(const void* const* rows, int count, int64_t i, int64_t width, const float* weight,
                 const float* other_weight, float* sum, float* other_sum) {
  const bool whole = width == kVectors * Vec::kWidth;
  Vec total[kVectors], other_total[kVectors];
  for (int k = 0; k < kVectors; ++k) total[k] = other_total[k] = Vec::zero();
  for (int r = 0; r < count; ++r) {
    const T* row = static_cast<const T*>(rows[r]) + i;
    const Vec d = Vec::broadcast(weight[r]);
    const Vec dz = kOther ? Vec::broadcast(other_weight[r]) : d;
    for (int k = 0; k < kVectors; ++k) {
      const Vec h = whole ? Vec::load(row + k * Vec::kWidth) : load_partial(row, width);
      total[k] = Vec::multiply_add(h, d, total[k]);
      if (kOther) other_total[k] = Vec::multiply_add(h, dz, other_total[k]);
    }
  }
  const auto add = [&](const Vec& addend, float* into) {
    if (whole) {
      (Vec::load(into) + addend).store(into);
    } else {
      store_partial(load_partial(into, width) + addend, into, width);
    }
  };
  for (int k = 0; k < kVectors; ++k) {
    add(total[k], sum + i + k * Vec::kWidth);
    if (kOther) add(other_total[k], other_sum + i + k * Vec::kWidth);
  }
}

template <typename T, bool kOther>
void add_rows_of_type(const void* const* rows, int count, int64_t dim, const float* weight,
                      const float* other_weight, float* sum, float* other_sum) {
  int64_t i = 0;
  for (; i + kTogether * Vec::kWidth <= dim; i += kTogether * Vec::kWidth) {
    add_columns<T, kTogether, kOther>(rows, count, i, kTogether * Vec::kWidth, weight, other_weight, sum,
                                      other_sum);
  }
  for (; i < dim; i += Vec::kWidth) {
    const int64_t width = dim - i < Vec::kWidth ? dim - i : Vec::kWidth;
    add_columns<T, 1, kOther>(rows, count, i, width, weight, other_weight, sum, other_sum);
  }
}

template <typename T>
void combine_of_type(int64_t dim, float d, const float* probe, float dz, const float* gate, T* row) {
  const Vec by_probe = Vec::broadcast(d), by_gate = Vec::broadcast(dz);
  for (int64_t i = 0; i < dim; i += Vec::kWidth) {
    const int64_t width = dim - i;
    const bool whole = width >= Vec::kWidth;
    const Vec w = whole ? Vec::load(probe + i) : load_partial(probe + i, width);
    Vec sum = Vec::multiply_add(by_probe, w, Vec::zero());
    if (gate != nullptr) {
      sum = Vec::multiply_add(by_gate, whole ? Vec::load(gate + i) : load_partial(gate + i, width), sum);
    }
    if (whole) {
      sum.store(row + i);
    } else {
      store_partial(sum, row + i, width);
    }
  }
}

}  // namespace

void add_rows(RowType type, const void* const* rows, int count, int64_t dim, const float* weight,
              const float* other_weight, float* sum, float* other_sum) {
  const auto run = [&]<typename T>(const T*) {
    if (other_weight != nullptr) {
      add_rows_of_type<T, true>(rows, count, dim, weight, other_weight, sum, other_sum);
    } else {
      add_rows_of_type<T, false>(rows, count, dim, weight, other_weight, sum, other_sum);
    }
  };
  switch (type) {
    case RowType::kFloat:
      return run(static_cast<const float*>(nullptr));
    case RowType::kBFloat16:
      return run(static_cast<const BFloat16*>(nullptr));
    case RowType::kHalf:
      return run(static_cast<const Half*>(nullptr));
  }
}

void combine(RowType type, int64_t dim, float d, const float* probe, float dz, const float* gate, void* row) {
  switch (type) {
    case RowType::kFloat:
      return combine_of_type(dim, d, probe, dz, gate, static_cast<float*>(row));
    case RowType::kBFloat16:
      return combine_of_type(dim, d, probe, dz, gate, static_cast<BFloat16*>(row));
    case RowType::kHalf:
      return combine_of_type(dim, d, probe, dz, gate, static_cast<Half*>(row));
  }
}

}  // namespace reprdpo::probe_reward::REPRDPO_CAPABILITY
