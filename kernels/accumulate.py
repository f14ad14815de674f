"""The last micro-step's gradients are added to float32 rows, and the partial Grams taken of them tile by tile.

A program adds to a tile, which is small enough to stay in cache (`bucketmoo_ds.kernels.launch`), and reads it back as
`gram_kernel` would: by the same functions, in the same order, so that the Gram is to the bit that of the finished rows.
"""

import triton
import triton.language as tl

from bucketmoo_ds.kernels.arguments import ARGUMENTS
from bucketmoo_ds.kernels.gram import (
    add_pairs,
    add_products,
    no_pairs,
    nothing_unless,
    pointer_to,
    read_tile,
    store_pairs,
    store_products,
)


@triton.jit(do_not_specialize=ARGUMENTS)
def accumulate_kernel(
    addresses, owners, updates, tiles, runs, partials, count,
    INCOMING: tl.constexpr, INCOMING_ALIGNED: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Updates a run, and takes its partial Gram where it belongs to a cell.

    owners: `[count, 3]` int64, for each row its first update, its last + 1, and whether the first one overwrites it.
    updates: `[M, 2]` int64, address of a gradient of `INCOMING`, and the bits of its float32 scale. The others as in
    `gram_kernel`.
    """
    run = tl.program_id(0).to(tl.int64)
    begin = tl.load(runs + run * 3)
    end = tl.load(runs + run * 3 + 1)
    inside = tl.load(runs + run * 3 + 2) >= 0
    # Runs outside of all segments stand at the end, and have no partial.
    partial = partials + run * count * count
    if ROWS <= 8:
        sums = no_pairs(tl.float32, ROWS, COLUMNS, ALIGNED)
        for tile in range(begin, end):
            start, length = read_tile(tiles, tile, ALIGNED)
            update_tile(addresses, owners, updates, count, start, length, INCOMING, INCOMING_ALIGNED, WIDTH, ALIGNED)
            taken = nothing_unless(inside, length, ALIGNED)
            sums = add_pairs(sums, addresses, count, start, taken, tl.float32, ROWS, COLUMNS, ALIGNED)
        if inside:
            store_pairs(sums, partial, count, ROWS)
    else:
        total = tl.zeros([ROWS, ROWS], tl.float64)
        for tile in range(begin, end):
            start, length = read_tile(tiles, tile, ALIGNED)
            update_tile(addresses, owners, updates, count, start, length, INCOMING, INCOMING_ALIGNED, WIDTH, ALIGNED)
            taken = nothing_unless(inside, length, ALIGNED)
            total = add_products(
                total, addresses, count, start, taken, tl.float32, ROWS, COLUMNS, ALIGNED, INTERPRETED
            )
        if inside:
            store_products(total, partial, count, ROWS)


@triton.jit
def update_tile(
    addresses, owners, updates, count, start, length,
    INCOMING: tl.constexpr, INCOMING_ALIGNED: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Adds to a tile of each row its gradients, in order, with one rounding each."""
    place = tl.arange(0, WIDTH)
    for row in range(count):
        first = tl.load(owners + row * 3)
        last = tl.load(owners + row * 3 + 1)
        fresh = tl.load(owners + row * 3 + 2) != 0
        if first < last:
            target = pointer_to(addresses, row, count, start, tl.float32, ALIGNED)
            for offset in range(0, length, WIDTH):
                inside = offset + place < length
                kept = offset + place < nothing_unless(fresh == 0, length, ALIGNED)
                value = tl.load(target + (offset + place), mask=kept, other=0.0)
                for update in range(first, last):
                    source = tl.load(updates + update * 2).to(tl.pointer_type(INCOMING)) + start
                    if INCOMING_ALIGNED:
                        source = tl.multiple_of(source, 16)
                    scale = tl.load(updates + update * 2 + 1).to(tl.int32).to(tl.float32, bitcast=True)
                    gradient = tl.load(source + (offset + place), mask=inside, other=0.0).to(tl.float32)
                    overwritten = fresh & (update == first)
                    value = tl.where(overwritten, scale * gradient, tl.fma(scale, gradient, value))
                tl.store(target + (offset + place), value, mask=inside)
    # The Gram reads what other threads of the program have written.
    tl.debug_barrier()
