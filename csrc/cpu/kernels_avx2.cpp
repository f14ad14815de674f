// The kernels for AVX2, FMA and F16C; compiled with -mavx2 -mfma -mf16c.
#include "kernels_impl.h"

namespace bucketmoo {

const Kernels* avx2_kernels() {
  static constexpr Kernels kernels{"avx2", gram, accumulate, combine};
  const bool runs = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return runs ? &kernels : nullptr;
}

}  // namespace bucketmoo
