// What the log-prob kernels have in common; compiled with each of them, once for each CPU capability.
#pragma once

#include "common/simd.h"
#include "logprob/logprob.h"

namespace reprdpo::logprob::REPRDPO_CAPABILITY {
namespace {

using namespace reprdpo::REPRDPO_CAPABILITY;

constexpr float kInfinity = __builtin_inff();
constexpr float kLowest = -0x1.fffffep127f;
constexpr float kSmallestNormal = 0x1p-126f;

// Numbers of a row that are added in float before the sum goes on in double.
constexpr int64_t kChunk = 1024;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// visit(an element of the type).
template <typename Visit>
inline auto with_type(Element type, const Visit& visit) {
  switch (type) {
    case Element::kBFloat16:
      return visit(BFloat16{});
    case Element::kHalf:
      return visit(Half{});
    case Element::kFloat:
      break;
  }
  return visit(float{});
}

// What is not a whole vector is read with `rest` in the other places.
template <typename T>
inline Vec load_up_to(const T* from, int64_t count, float rest = 0) {
  return count >= Vec::kWidth ? Vec::load(from) : load_partial(from, count, rest);
}
template <typename T>
inline void store_up_to(Vec value, T* to, int64_t count) {
  if (count >= Vec::kWidth) {
    value.store(to);
  } else {
    store_partial(value, to, count);
  }
}

}  // namespace
}  // namespace reprdpo::logprob::REPRDPO_CAPABILITY
