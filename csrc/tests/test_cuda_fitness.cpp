// Which machines a CUDA library serves.
#include <cstdio>

#include "common/cuda_fitness.h"

int main() {
  const std::vector<int> archs = {80, 90, 100};
  const struct {
    reprdpo::CudaMachine machine;
    int runtime;
    const char* wanted;
  } cases[] = {
      {{13000, {90}}, 13000, ""},
      {{13000, {90}}, 13010, ""},  // a later minor version needs no later driver
      {{13010, {80, 86, 90}}, 12080, ""},
      {{13000, {103, 120}}, 13000, ""},
      {{13000, {}}, 13000, ""},
      {{12080, {}}, 13000, "it needs a driver for CUDA 13, this one serves 12.8"},
      {{13000, {90, 75}}, 13000, "it has no code for a device of compute capability 7.5"},
  };
  int failures = 0;
  for (const auto& [machine, runtime, wanted] : cases) {
    const std::string got = reprdpo::unfit(machine, runtime, archs);
    if (got == wanted) continue;
    ++failures;
    std::printf("FAILED: \"%s\", not \"%s\"\n", got.c_str(), wanted);
  }
  // Machine code of 9.0 runs on no other major version, and there is PTX of the last architecture alone.
  failures += reprdpo::unfit({13000, {80}}, 13000, {90}).empty();
  failures += reprdpo::unfit({13000, {89}}, 13000, {80, 90}).empty() ? 0 : 1;
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
