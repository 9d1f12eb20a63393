// Loops over independent items, spread over torch's own threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace reprdpo {

// Below this many bytes a thread costs more to wake than it saves.
constexpr int64_t kBytesPerThread = 64 * 1024;

// body(item) for every item in [0, items), each of which moves about bytes_per_item.
template <typename Body>
void parallel_for_each(int64_t items, int64_t bytes_per_item, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kBytesPerThread / std::max<int64_t>(1, bytes_per_item));
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) body(item);
  });
}

}  // namespace reprdpo
