// The CUDA runtime of a test: a kernel's source compiled as host code and run a fiber for each thread, block
// after block. It checks arithmetic, addresses (under AddressSanitizer) and barriers; not timing, nor races
// between blocks.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#define REPRDPO_CAPABILITY portable
#include "common/cuda_queries.h"
#include "common/simd.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define REPRDPO_FIBERS_UNDER_ASAN
#endif

#define __global__
#define __device__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

struct Dimension {
  unsigned x;
};
inline Dimension threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::kDone;
  unsigned phase = 0;  // how many exchanges its warp has made
};

constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned kLanes = 32;

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned running;
inline void (*body)();
inline float exchanged[2][1024];
inline uint32_t last_block_order_seed = 0;

[[noreturn]] inline void fail(const char* what) {
  std::printf("FAILED emulation: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::exit(1);
}

inline void switch_to_scheduler() {
  Fiber& fiber = fibers[running];
#ifdef REPRDPO_FIBERS_UNDER_ASAN
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(fiber.state == State::kDone ? nullptr : &fake_stack, nullptr, 0);
  swapcontext(&fiber.context, &scheduler);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
  swapcontext(&fiber.context, &scheduler);
#endif
}

inline void wait(State state) {
  fibers[running].state = state;
  switch_to_scheduler();
}

inline void start() {
#ifdef REPRDPO_FIBERS_UNDER_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  body();
  fibers[running].state = State::kDone;
  switch_to_scheduler();
}

inline void resume(unsigned thread) {
  running = threadIdx.x = thread;
  fibers[thread].state = State::kReady;
#ifdef REPRDPO_FIBERS_UNDER_ASAN
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fibers[thread].stack.get(), kStackBytes);
  swapcontext(&scheduler, &fibers[thread].context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
  swapcontext(&scheduler, &fibers[thread].context);
#endif
}

// Lets a warp, or the block, go on when all that still run have come to the same barrier.
inline bool release(unsigned begin, unsigned end, State barrier) {
  for (unsigned t = begin; t < end; ++t) {
    if (fibers[t].state != barrier) return false;
  }
  for (unsigned t = begin; t < end; ++t) fibers[t].state = State::kReady;
  return true;
}

inline void run_block(unsigned threads) {
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    fiber.state = State::kReady;
    fiber.phase = 0;
    makecontext(&fiber.context, &start, 0);
  }
  for (unsigned done = 0; done < threads;) {
    bool moved = false;
    for (unsigned t = 0; t < threads; ++t) {
      if (fibers[t].state != State::kReady) continue;
      resume(t);
      moved = true;
      done += fibers[t].state == State::kDone;
    }
    for (unsigned t = 0; t < threads; t += kLanes) moved |= release(t, t + kLanes, State::kAtWarpBarrier);
    moved |= release(0, threads, State::kAtBlockBarrier);
    if (!moved && done < threads) fail("threads wait at different barriers, or some have left");
  }
}

// What each lane of the running thread's warp gave to this exchange, once all have.
inline const float* exchange(float value) {
  Fiber& fiber = fibers[running];
  float* slots = exchanged[fiber.phase++ % 2];
  slots[running] = value;
  wait(State::kAtWarpBarrier);
  return slots + running / kLanes * kLanes;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::State::kAtBlockBarrier); }
inline void __threadfence() {}
inline float __shfl_xor_sync(unsigned, float value, int distance) {
  return emulation::exchange(value)[threadIdx.x % emulation::kLanes ^ static_cast<unsigned>(distance)];
}
inline unsigned __ballot_sync(unsigned, bool holds) {
  const float* votes = emulation::exchange(holds ? 1.0f : 0.0f);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < emulation::kLanes; ++lane) ballot |= (votes[lane] != 0.0f ? 1u : 0u) << lane;
  return ballot;
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline unsigned atomicInc(unsigned* counter, unsigned most) {
  const unsigned before = *counter;
  *counter = before >= most ? 0 : before + 1;
  return before;
}
template <typename T>
inline T __ldcg(const T* from) {
  return *from;
}
inline float __uint_as_float(uint32_t bits) { return reprdpo::portable::bits_to_float(bits); }
inline uint32_t __float_as_uint(float value) { return reprdpo::portable::float_to_bits(value); }
using std::fmaf;
inline reprdpo::Half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(reprdpo::Half half) { return half.bits; }
inline float __half2float(reprdpo::Half half) { return reprdpo::portable::to_float(half); }
inline reprdpo::Half __float2half_rn(float value) {
  reprdpo::Half half;
  reprdpo::portable::from_float(value, &half);
  return half;
}
inline cudaError_t cudaGetSymbolAddress(void** address, unsigned* symbol) {
  *address = symbol;
  return cudaSuccess;
}

namespace reprdpo {

inline const char* text(cudaError_t) { return nullptr; }

// Blocks run one after another, in another order at every launch.
template <typename Arguments>
const char* launch(void (*kernel)(Arguments), int64_t blocks, int threads, CudaStream,
                   const Arguments& arguments) {
  using emulation::fibers;
  static void (*current_kernel)(Arguments);
  static const Arguments* current_arguments;
  current_kernel = kernel;
  current_arguments = &arguments;
  emulation::body = [] { current_kernel(*current_arguments); };
  while (fibers.size() < static_cast<size_t>(threads)) {
    fibers.emplace_back();
    fibers.back().stack = std::make_unique<char[]>(emulation::kStackBytes);
  }
  blockDim.x = static_cast<unsigned>(threads);
  gridDim.x = static_cast<unsigned>(blocks);
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), std::mt19937(++emulation::last_block_order_seed));
  for (unsigned block : order) {
    blockIdx.x = block;
    emulation::run_block(static_cast<unsigned>(threads));
  }
  return nullptr;
}

}  // namespace reprdpo
