#include "common/cuda_queries.h"
#include "common/device.cuh"

namespace reprdpo {

const char* multiprocessors_of(int device, int* count) {
  return text(cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device));
}

const char* is_capturing(CudaStream stream, bool* capturing) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  *capturing = status != cudaStreamCaptureStatusNone;
  return text(error);
}

bool is_per_thread(CudaStream stream) { return stream == cudaStreamPerThread; }

AllowedInCapture::AllowedInCapture() {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  mode_ = mode;
}

AllowedInCapture::~AllowedInCapture() {
  cudaStreamCaptureMode mode = static_cast<cudaStreamCaptureMode>(mode_);
  cudaThreadExchangeStreamCaptureMode(&mode);
}

}  // namespace reprdpo
