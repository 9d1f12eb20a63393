// What the host side of a CUDA op asks of the runtime, without its headers. Errors come back as text, null
// being none.
#pragma once

namespace reprdpo {

using CudaStream = void*;

const char* multiprocessors_of(int device, int* count);
const char* is_capturing(CudaStream stream, bool* capturing);
// Whether the handle stands for another stream in each host thread.
bool is_per_thread(CudaStream stream);

}  // namespace reprdpo
