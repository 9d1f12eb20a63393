// What the host side of a CUDA op asks of the runtime, without its headers. Errors come back as text, null
// being none.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace reprdpo {

using CudaStream = void*;

const char* multiprocessors_of(int device, int* count);
const char* is_capturing(CudaStream stream, bool* capturing);
// Sets device memory to zero on a stream.
const char* clear(void* data, size_t bytes, CudaStream stream);
// Why a library for these architectures cannot serve this machine, empty where it can; see cuda_fitness.h.
std::string unfit_here(const std::vector<int>& architectures);
// Whether the handle stands for another stream in each host thread.
bool is_per_thread(CudaStream stream);

// While it lives, this thread may do what else would end a capture: a device's first call loads code and
// variables.
class AllowedInCapture {
 public:
  AllowedInCapture();
  ~AllowedInCapture();
  AllowedInCapture(const AllowedInCapture&) = delete;
  AllowedInCapture& operator=(const AllowedInCapture&) = delete;

 private:
  int mode_;  // the thread's, a cudaStreamCaptureMode
};

}  // namespace reprdpo
