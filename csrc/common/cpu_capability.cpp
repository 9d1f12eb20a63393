#include "common/cpu_capability.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace reprdpo {
namespace {

CpuCapability best_supported() {
#ifdef REPRDPO_X86_KERNELS
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2 && avx512 && __builtin_cpu_supports("avx512bf16")) return CpuCapability::kAvx512Bf16;
  if (avx2 && avx512) return CpuCapability::kAvx512;
  if (avx2) return CpuCapability::kAvx2;
#endif
  return CpuCapability::kPortable;
}

CpuCapability highest_wanted() {
  const char* asked = std::getenv("REPRDPO_CPU_CAPABILITY");
  if (asked != nullptr) {
    for (CpuCapability capability : {CpuCapability::kPortable, CpuCapability::kAvx2, CpuCapability::kAvx512}) {
      if (std::strcmp(asked, name(capability)) == 0) return capability;
    }
  }
  return CpuCapability::kAvx512Bf16;
}

}  // namespace

CpuCapability cpu_capability() {
  static const CpuCapability capability = std::min(best_supported(), highest_wanted());
  return capability;
}

const char* name(CpuCapability capability) {
  switch (capability) {
    case CpuCapability::kAvx512Bf16:
      return "avx512bf16";
    case CpuCapability::kAvx512:
      return "avx512";
    case CpuCapability::kAvx2:
      return "avx2";
    case CpuCapability::kPortable:
      break;
  }
  return "portable";
}

}  // namespace reprdpo
