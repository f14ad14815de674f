// The kernels for 16 lanes, through plain functions that ctypes can call.
#include "intrinsics.h"

// After it, for vectors of 64 bytes cannot be pinned to a register here.
#define asm(...)
#include "kernels_impl.h"
#undef asm

extern "C" {

void gram(const void* const* rows, int dtype, int num_rows, int64_t begin, int64_t count, double* pairs) {
  bucketmoo::gram(rows, static_cast<bucketmoo::Dtype>(dtype), num_rows, begin, count, begin + count, pairs);
}

void accumulate(float* row, const void* incoming, int dtype, float scale, bool fresh, int64_t begin, int64_t count) {
  bucketmoo::accumulate(row, incoming, static_cast<bucketmoo::Dtype>(dtype), scale, fresh, begin, count);
}

void combine(const void* const* rows, int dtype, const double* weights, int num_rows, int64_t begin, int64_t count,
             void* out, int out_dtype) {
  bucketmoo::combine(rows, static_cast<bucketmoo::Dtype>(dtype), weights, num_rows, begin, count, out,
                     static_cast<bucketmoo::Dtype>(out_dtype));
}

}
