// The min-norm weights of blocks, in float64. Knows pointers and counts, no tensors.
#pragma once

#include <cstdint>

extern "C" {

// Solves the blocks [begin, end), one after the other; see bucketmoo_ds/ops/backends/min_norm.py for what and how.
//
// gram [B, K, K], mask [B, K], weights [B, K] and finite [B] start at block 0; K is at most 64, and max_weight in
// (0, 1].
// steps [B, 2], where it is not null, receives how many major steps were taken, each of which frees rows and goes on to
// the optimum of a set of free rows, and for how many sets of free rows equations were solved in all; 0 and 0 where
// there was a closed form.
// A block's weights depend on its own Gram and mask only: threads may share out the blocks in any way. Compiled without
// contraction of products and sums, they are the same bits on every machine.
void bucketmoo_min_norm(const double* gram, const bool* mask, double max_weight, double* weights, bool* finite,
                        int64_t begin, int64_t end, int64_t K, int64_t* steps);

}  // extern "C"
