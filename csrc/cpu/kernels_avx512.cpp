// The kernels for AVX-512; compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma.
#include "kernels_impl.h"

namespace bucketmoo {

const Kernels* avx512_kernels() {
  static constexpr Kernels kernels{"avx512", gram, accumulate, combine};
  const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return runs ? &kernels : nullptr;
}

}  // namespace bucketmoo
