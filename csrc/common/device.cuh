// What CUDA kernels are written in: elements to float and back, 16-byte access, sums over a warp, the launch.
//
// nvcc compiles this for devices; tests/cuda_emulation.h stands in for the CUDA runtime where a test compiles
// a kernel as host code, a fiber for each thread.
#pragma once

#include <stdint.h>

#include "common/cuda_queries.h"
#include "common/element_types.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace reprdpo {

// What went wrong, null where nothing did. The runtime then forgets it, or the next launch would be blamed.
inline const char* text(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

template <typename Arguments>
const char* launch(void (*kernel)(Arguments), int64_t blocks, int threads, CudaStream stream,
                   const Arguments& arguments) {
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments);
  return text(cudaGetLastError());
}

}  // namespace reprdpo
#endif

namespace reprdpo {

constexpr int kWarpSize = 32;

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(BFloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
__device__ inline float to_float(Half value) { return __half2float(__ushort_as_half(value.bits)); }

// To the nearest, ties to even.
__device__ inline void from_float(float value, float& into) { into = value; }
__device__ inline void from_float(float value, BFloat16& into) {
  const uint32_t bits = __float_as_uint(value);
  into.bits = value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
__device__ inline void from_float(float value, Half& into) {
  into.bits = __half_as_ushort(__float2half_rn(value));
}

// As many elements as one 16-byte access moves.
template <typename T>
struct alignas(16) Vector {
  static constexpr int kWidth = 16 / sizeof(T);
  T at[kWidth];
};

// Every lane gets the same sum, added in the same order on every run.
__device__ inline float warp_sum(float value) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}
__device__ inline float warp_max(float value) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

}  // namespace reprdpo
