"""The weighted sum of the rows of every segment; weights are read on the device."""

import triton
import triton.language as tl

from bucketmoo_ds.kernels.arguments import ARGUMENTS
from bucketmoo_ds.kernels.gram import nothing_unless, pointer_to, read_tile

# Rows whose loads are on their way together; the last group is padded with rows that nobody reads.
AHEAD = tl.constexpr(4)


@triton.jit(do_not_specialize=ARGUMENTS)
def combine_kernel(
    addresses, weights, tiles, runs, count,
    ELEMENT: tl.constexpr, OUT: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Writes a run of tiles of `out`, whose address stands behind those of the rows: addresses is `[count + 1]`.

    weights: `[C, count]` float64. A weight of 0 leaves its row unread; a run outside of all segments has no weights.
    Runs, and the tiles of each, are walked from the last to the first: behind the kernel of the Gram, the tiles that
    it has read last still lie in the L2 cache. `out` may be a row: a program reads a chunk of all rows before it
    writes it, and nobody else touches that chunk.
    """
    run = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    begin = tl.load(runs + run * 3)
    end = tl.load(runs + run * 3 + 1)
    cell = tl.load(runs + run * 3 + 2)
    REAL: tl.constexpr = tl.float64 if tl.float64 == ELEMENT else tl.float32
    place = tl.arange(0, COLUMNS)
    for step in range(begin, end):
        start, length = read_tile(tiles, begin + end - 1 - step, ALIGNED)
        out = pointer_to(addresses, count, count + 1, start, OUT, ALIGNED)
        for offset in range(0, length, COLUMNS):
            combined = tl.zeros([COLUMNS], REAL)
            for base in range(0, count, AHEAD):
                for ahead in tl.static_range(AHEAD):
                    row = base + ahead
                    weight = tl.load(weights + cell * count + row, mask=(row < count) & (cell >= 0), other=0.0)
                    pointer = pointer_to(addresses, row, count, start, ELEMENT, ALIGNED)
                    read = offset + place < nothing_unless(weight != 0.0, length, ALIGNED)
                    value = tl.load(pointer + (offset + place), mask=read, other=0.0)
                    combined = tl.fma(value.to(REAL), weight.to(REAL), combined)
            tl.store(out + (offset + place), combined.to(OUT), mask=offset + place < length)
