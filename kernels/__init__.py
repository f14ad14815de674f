"""Triton kernels of the ops, installed as `bucketmoo_ds.kernels` (see setup.py for why not as `kernels`).

    gram         partial Grams of runs of tiles, and their sums by cell
    accumulate   the same, while gradients are added to the rows
    min_norm     min-norm weights
    combine      weighted sums of rows
    launch       how each is launched: a table
    arguments    what they are given at run time
    aot          compiles the whole table without a GPU, and reports registers, stacks and widths of loads

`bucketmoo_ds.ops.backends.triton` cuts shards into tiles and launches. `resolve` is three of these launches; a barrier
of the whole grid, that would make it one, is not to be had in Triton without atomics: the CUDA backend has it.
"""
