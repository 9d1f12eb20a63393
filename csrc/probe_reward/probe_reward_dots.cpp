// The dot products of probe_reward; compiled once for each CPU capability (see common/simd.h).
#include "common/simd.h"
#include "probe_reward/probe_reward.h"

namespace reprdpo::probe_reward::REPRDPO_CAPABILITY {
namespace {

using reprdpo::REPRDPO_CAPABILITY::load_partial;
using reprdpo::REPRDPO_CAPABILITY::Vec;

// A running sum of n products has a rounding error that grows as n; partial sums of 256 keep it small.
constexpr int64_t kChunk = 256;

template <int kRows, bool kGate>
struct Sums {
  Vec probe[kRows];
  Vec gate[kRows];

  Sums() {
    for (int r = 0; r < kRows; ++r) probe[r] = gate[r] = Vec::zero();
  }
  void add(const Sums& other) {
    for (int r = 0; r < kRows; ++r) {
      probe[r] = probe[r] + other.probe[r];
      if (kGate) gate[r] = gate[r] + other.gate[r];
    }
  }
  void multiply_add(int r, Vec h, Vec w, Vec v) {
    probe[r] = Vec::multiply_add(h, w, probe[r]);
    if (kGate) gate[r] = Vec::multiply_add(h, v, gate[r]);
  }
};

template <typename T, int kRows, bool kGate>
void dots_of_rows(const void* const* rows, int64_t dim, const float* probe, const float* gate, float* scores,
                  float* logits) {
  Sums<kRows, kGate> total;
  const int64_t whole = dim - dim % Vec::kWidth;
  for (int64_t begin = 0; begin < whole; begin += kChunk) {
    const int64_t end = begin + kChunk < whole ? begin + kChunk : whole;
    Sums<kRows, kGate> chunk;
    for (int64_t i = begin; i < end; i += Vec::kWidth) {
      const Vec w = Vec::load(probe + i);
      const Vec v = kGate ? Vec::load(gate + i) : w;
      for (int r = 0; r < kRows; ++r)
        chunk.multiply_add(r, Vec::load(static_cast<const T*>(rows[r]) + i), w, v);
    }
    total.add(chunk);
  }
  if (whole < dim) {
    const Vec w = load_partial(probe + whole, dim - whole);
    const Vec v = kGate ? load_partial(gate + whole, dim - whole) : w;
    for (int r = 0; r < kRows; ++r) {
      total.multiply_add(r, load_partial(static_cast<const T*>(rows[r]) + whole, dim - whole), w, v);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    scores[r] = total.probe[r].sum();
    if (kGate) logits[r] = total.gate[r].sum();
  }
}

template <typename T, bool kGate>
void dots_of_type(const void* const* rows, int count, int64_t dim, const float* probe, const float* gate,
                  float* scores, float* logits) {
  static_assert(kMaxRows == 4);
  switch (count) {
    case 1:
      return dots_of_rows<T, 1, kGate>(rows, dim, probe, gate, scores, logits);
    case 2:
      return dots_of_rows<T, 2, kGate>(rows, dim, probe, gate, scores, logits);
    case 3:
      return dots_of_rows<T, 3, kGate>(rows, dim, probe, gate, scores, logits);
    case 4:
      return dots_of_rows<T, 4, kGate>(rows, dim, probe, gate, scores, logits);
  }
}

template <bool kGate>
void dots_with_gate(RowType type, const void* const* rows, int count, int64_t dim, const float* probe,
                    const float* gate, float* scores, float* logits) {
  switch (type) {
    case RowType::kFloat:
      return dots_of_type<float, kGate>(rows, count, dim, probe, gate, scores, logits);
    case RowType::kBFloat16:
      return dots_of_type<BFloat16, kGate>(rows, count, dim, probe, gate, scores, logits);
    case RowType::kHalf:
      return dots_of_type<Half, kGate>(rows, count, dim, probe, gate, scores, logits);
  }
}

}  // namespace

void dots(RowType type, const void* const* rows, int count, int64_t dim, const float* probe,
          const float* gate, float* scores, float* logits) {
  if (gate != nullptr) {
    dots_with_gate<true>(type, rows, count, dim, probe, gate, scores, logits);
  } else {
    dots_with_gate<false>(type, rows, count, dim, probe, gate, scores, logits);
  }
}

}  // namespace reprdpo::probe_reward::REPRDPO_CAPABILITY
