// Counters by which blocks of a launch learn that they are the last: zero before and after every launch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <thread>
#include <tuple>

#include "common/cuda_queries.h"

namespace reprdpo {

// Hands out stretches of a device's counters that no other launch uses at the same time: launches of one
// stream follow one another and share theirs; a captured launch, which may be replayed anywhere, keeps its
// own for good.
class Arrivals {
 public:
  explicit Arrivals(int64_t capacity) : capacity_(capacity) {}

  // Where `count` counters start; nothing where all are given out.
  std::optional<int64_t> take(int device, CudaStream stream, bool capturing, int64_t count) {
    const std::lock_guard lock(mutex_);
    if (capturing) return fresh(device, count);
    const auto thread = is_per_thread(stream) ? std::this_thread::get_id() : std::thread::id();
    Stretch& kept = by_stream_[{device, stream, thread}];
    if (kept.count < count) {
      const int64_t wanted = std::max<int64_t>(64, 2 * count);
      const auto start = fresh(device, wanted);
      if (!start.has_value()) return std::nullopt;
      kept = {*start, wanted};
    }
    return kept.start;
  }

 private:
  struct Stretch {
    int64_t start = 0, count = 0;
  };

  std::optional<int64_t> fresh(int device, int64_t count) {
    int64_t& used = used_[device];
    if (count > capacity_ - used) return std::nullopt;
    used += count;
    return used - count;
  }

  const int64_t capacity_;
  std::mutex mutex_;
  std::map<int, int64_t> used_;
  std::map<std::tuple<int, CudaStream, std::thread::id>, Stretch> by_stream_;
};

}  // namespace reprdpo
