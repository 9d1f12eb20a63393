#include "common/cuda_fitness.h"
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

const char* clear(void* data, size_t bytes, CudaStream stream) {
  return text(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)));
}

std::string unfit_here(const std::vector<int>& architectures) {
  CudaMachine machine = {};
  int devices = 0;
  if (const char* error = text(cudaDriverGetVersion(&machine.driver))) return error;
  cudaGetDeviceCount(&devices);  // none where the driver is too old
  for (int device = 0; device < devices; ++device) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    machine.devices.push_back(10 * major + minor);
  }
  cudaGetLastError();
  return unfit(machine, CUDART_VERSION, architectures);
}

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
