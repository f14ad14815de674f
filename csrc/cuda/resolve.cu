// When one launch pays for resolve, and which.
#include "resolve.cuh"

namespace bucketmoo {

int64_t resolve_slots(const Rows& rows, const Tiles& tiles, int64_t elements) {
  // A quarter of L2 is left to what else is written.
  const bool resident = elements * rows.count * size_of(rows.dtype) <= current_device().l2_bytes / 4 * 3;
  if (!resident || tiles.inside == 0) return 0;
  const int64_t parts = rows.dtype == Dtype::kBFloat16  ? resolve_parts_bfloat16(rows, tiles)
                        : rows.dtype == Dtype::kFloat16 ? resolve_parts_float16(rows, tiles)
                                                        : resolve_parts_float(rows, tiles);
  return slots(tiles, parts);
}

void resolve(
    const Rows& rows, const Tiles& tiles, const bool* mask, double max_weight, double* partials, double* gram,
    double* weights, bool* finite, void* out, Dtype out_dtype, void* stream) {
  const Resolve problem{rows,     tiles, common_shift(rows), 0,      mask, max_weight,
                        partials, gram,  weights,            finite, out,  out_dtype};
  switch (rows.dtype) {
    case Dtype::kBFloat16: return launch_resolve_bfloat16(problem, stream);
    case Dtype::kFloat16: return launch_resolve_float16(problem, stream);
    default: return launch_resolve_float(problem, stream);
  }
}

}  // namespace bucketmoo
