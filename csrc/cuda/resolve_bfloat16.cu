// resolve of bfloat16 rows.
#include "resolve.cuh"

namespace bucketmoo {

int64_t resolve_parts_bfloat16(const Rows& rows, const Tiles& tiles) {
  return dispatch_tensor<BFloat16Format>(rows, [&]<class Gram>() { return resolve_parts<Gram>(rows, tiles); });
}

void launch_resolve_bfloat16(const Resolve& problem, void* stream) {
  dispatch_tensor<BFloat16Format>(problem.rows, [&]<class Gram>() { launch_resolve<Gram>(problem, stream); });
}

}  // namespace bucketmoo
