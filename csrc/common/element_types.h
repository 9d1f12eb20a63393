// The 16-bit floating types, as storage; arithmetic is in float.
#pragma once

#include <stdint.h>

namespace reprdpo {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

}  // namespace reprdpo
