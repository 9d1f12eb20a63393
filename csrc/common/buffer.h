// Working memory of an op: aligned to a cache line, left as it comes, on large pages where it is large.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace reprdpo {

constexpr size_t kLargePage = size_t{1} << 21;

// Asks for large pages under memory that nothing has touched yet: a fault for each small page of a large result
// costs as much as writing it.
inline void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef __linux__
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kLargePage * kLargePage;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

class Buffer {
 public:
  explicit Buffer(size_t bytes) {
    const size_t alignment = bytes >= kLargePage ? kLargePage : 64;
    const size_t whole = (bytes + alignment - 1) / alignment * alignment;
    data_ = std::aligned_alloc(alignment, whole == 0 ? alignment : whole);
    if (data_ == nullptr) throw std::bad_alloc();
    prefer_large_pages(data_, whole);
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  template <typename T = char>
  T* as() {
    return static_cast<T*>(data_);
  }

 private:
  void* data_;
};

}  // namespace reprdpo
