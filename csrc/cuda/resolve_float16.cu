// resolve of float16 rows.
#include "resolve.cuh"

namespace bucketmoo {

int64_t resolve_parts_float16(const Rows& rows, const Tiles& tiles) {
  return dispatch_tensor<Float16Format>(rows, [&]<class Gram>() { return resolve_parts<Gram>(rows, tiles); });
}

void launch_resolve_float16(const Resolve& problem, void* stream) {
  dispatch_tensor<Float16Format>(problem.rows, [&]<class Gram>() { launch_resolve<Gram>(problem, stream); });
}

}  // namespace bucketmoo
