// Whether a CUDA library can serve a machine: known before its first launch, which would fail, so that
// another backend serves.
#pragma once

#include <string>
#include <vector>

namespace reprdpo {

// Compute capabilities as nvcc writes them, 90 for 9.0; CUDA versions as the runtime does, 13000 for 13.0.
struct CudaMachine {
  int driver;
  std::vector<int> devices;
};

// Why not, in words; empty where it can. There is machine code for `architectures`, which serves devices of
// the same major version and no lesser minor one, and PTX of the last for those that came after it.
inline std::string unfit(const CudaMachine& machine, int runtime, const std::vector<int>& architectures) {
  const auto dotted = [](int whole, int part) { return std::to_string(whole) + "." + std::to_string(part); };
  if (machine.driver / 1000 < runtime / 1000) {
    return "it needs a driver for CUDA " + std::to_string(runtime / 1000) + ", this one serves " +
           dotted(machine.driver / 1000, machine.driver % 1000 / 10);
  }
  for (int device : machine.devices) {
    bool served = device >= architectures.back();
    for (int known : architectures) served = served || (known / 10 == device / 10 && known <= device);
    if (!served)
      return "it has no code for a device of compute capability " + dotted(device / 10, device % 10);
  }
  return "";
}

}  // namespace reprdpo
