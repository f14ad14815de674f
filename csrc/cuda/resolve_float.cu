// resolve of float32 and float64 rows.
#include "resolve.cuh"

namespace bucketmoo {
namespace {

template <class Launch>
auto dispatch_float(const Rows& rows, const Launch& launch) {
  if (rows.dtype == Dtype::kFloat64) return launch.template operator()<StagedGram<double>>();
  return dispatch_float32(rows, launch);
}

}  // namespace

int64_t resolve_parts_float(const Rows& rows, const Tiles& tiles) {
  return dispatch_float(rows, [&]<class Gram>() { return resolve_parts<Gram>(rows, tiles); });
}

void launch_resolve_float(const Resolve& problem, void* stream) {
  dispatch_float(problem.rows, [&]<class Gram>() { launch_resolve<Gram>(problem, stream); });
}

}  // namespace bucketmoo
