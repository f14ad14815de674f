// The kernels for every machine of this architecture: SSE2 on x86-64, NEON on 64-bit Arm.
#include "kernels_impl.h"

namespace bucketmoo {

const Kernels* baseline_kernels() {
  static constexpr Kernels kernels{"baseline", gram, accumulate, combine};
  return &kernels;
}

}  // namespace bucketmoo
