// Which version of a kernel this machine runs.
#pragma once

namespace reprdpo {

enum class CpuCapability { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// The best that the processor has and the library was built with; asked once.
// REPRDPO_CPU_CAPABILITY = portable | avx2 | avx512 | avx512bf16 lowers it, never raises it.
CpuCapability cpu_capability();

const char* name(CpuCapability capability);

// A kernel compiled in the namespaces portable, avx2 and avx512, as this machine should call it; in the second
// form also in avx512bf16.
#ifdef REPRDPO_X86_KERNELS
#define REPRDPO_PICK(kernel)                                                          \
  (::reprdpo::cpu_capability() >= ::reprdpo::CpuCapability::kAvx512 ? &avx512::kernel \
   : ::reprdpo::cpu_capability() == ::reprdpo::CpuCapability::kAvx2 ? &avx2::kernel   \
                                                                    : &portable::kernel)
#define REPRDPO_PICK_BF16(kernel)                                                                 \
  (::reprdpo::cpu_capability() == ::reprdpo::CpuCapability::kAvx512Bf16 ? &avx512bf16::kernel \
                                                                        : REPRDPO_PICK(kernel))
#else
#define REPRDPO_PICK(kernel) (&portable::kernel)
#define REPRDPO_PICK_BF16(kernel) (&portable::kernel)
#endif

}  // namespace reprdpo
