"""Partial Grams of runs of tiles, and their sums by cell.

A program takes a run: consecutive tiles of one cell. It writes one partial Gram, which `add_partials` adds up in a
fixed order: no atomics, and equal bits from run to run. There are two ways to multiply, by the number of rows:

    up to 8 rows   every pair of rows by unrolled multiplications and additions, straight from registers; a tensor
                   core would multiply 16 rows, of which most are padding
    above          `tl.dot`: tensor cores for bfloat16, float16 and float64, multiply-adds for float32 (of which TF32
                   would keep 10 bits)

Products of bfloat16 and float16 are exact in float32. Float32 sums are short, then go to float64 (`CHAIN` below). All
pairs of rows are summed in the same order, wherever they stand, and the product is symmetric in its factors: a
permutation of the rows permutes the Gram to the bit.

Rows are read through a table of addresses. TMA descriptors would not help: each row is an allocation of its own and
needs one of its own, made on the host or by every program, and its address must be a multiple of 16; one load of 16
bytes a thread from all rows keeps as many bytes on their way.
"""

# ruff: noqa: RUF005  Triton knows tuples, and no unpacking of them.

import triton
import triton.language as tl

from bucketmoo_ds.kernels.arguments import ARGUMENTS

# How many chunks a float32 sum of pairs takes before it goes to float64. A chunk adds 16 bytes of each row a thread:
# sums of 4 (float32) or 8 (16-bit) products, then 8 of those. A product passes at most 1 + 3 + 8 (its own, of float32)
# or 7 + 8 roundings: |dG_ij| <= 15 * 2^-24 sqrt(G_ii G_jj) < 1e-6 by Cauchy and Schwarz, for any number of elements.
CHAIN = tl.constexpr(8)
# Products of a float32 sum in a float32 `tl.dot`, for the same bound.
DOT_CHAIN = tl.constexpr(16)


@triton.jit(do_not_specialize=ARGUMENTS)
def gram_kernel(
    addresses, tiles, runs, partials, count,
    ELEMENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Takes the partial Gram `[count, count]` of the run that this program stands for.

    addresses: `[count]` int64, of rows of `ELEMENT`. tiles: `[T, 3]` int64, start, length and cell. runs: `[R, 3]`
    int64, first tile, last tile + 1 and cell. partials: `[R, count, count]` float64. `ROWS` is count, padded.
    `ALIGNED`: the tiles of all rows begin at multiples of 16 bytes, and are of multiples of 16 elements.
    """
    run = tl.program_id(0).to(tl.int64)
    begin = tl.load(runs + run * 3)
    end = tl.load(runs + run * 3 + 1)
    partial = partials + run * count * count
    if ROWS <= 8:
        sums = no_pairs(ELEMENT, ROWS, COLUMNS, ALIGNED)
        for tile in range(begin, end):
            start, length = read_tile(tiles, tile, ALIGNED)
            sums = add_pairs(sums, addresses, count, start, length, ELEMENT, ROWS, COLUMNS, ALIGNED)
        store_pairs(sums, partial, count, ROWS)
    else:
        total = tl.zeros([ROWS, ROWS], tl.float64)
        for tile in range(begin, end):
            start, length = read_tile(tiles, tile, ALIGNED)
            total = add_products(
                total, addresses, count, start, length, ELEMENT, ROWS, COLUMNS, ALIGNED, INTERPRETED
            )
        store_products(total, partial, count, ROWS)


@triton.jit
def read_tile(tiles, tile, ALIGNED: tl.constexpr):
    """Returns the start (int64) and the length (int32) of a tile."""
    start = tl.load(tiles + tile * 3)
    length = tl.load(tiles + tile * 3 + 1).to(tl.int32)
    if ALIGNED:
        length = tl.multiple_of(length, 16)
    return start, length


@triton.jit
def nothing_unless(condition, length, ALIGNED: tl.constexpr):
    """Returns the length, or 0. (The interpreter makes integers of a mask that is combined with a scalar.)"""
    length = tl.where(condition, length, 0)
    if ALIGNED:
        length = tl.multiple_of(length, 16)
    return length


@triton.jit
def pointer_to(addresses, row, count, start, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """Returns pointers to rows, from an element on; nobody reads those beyond count."""
    pointer = tl.load(addresses + row, mask=row < count, other=0).to(tl.pointer_type(ELEMENT)) + start
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def no_pairs(ELEMENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """Returns a sum for each pair of rows i <= j and each thread's share of a chunk."""
    VECTOR: tl.constexpr = 128 // ELEMENT.primitive_bitwidth if ALIGNED else 1
    sums = ()
    for _ in tl.static_range(ROWS * (ROWS + 1) // 2):
        sums = sums + (tl.full([COLUMNS // VECTOR], 0.0, tl.float64),)
    return sums


@triton.jit
def add_pairs(
    sums, addresses, count, start, length,
    ELEMENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Adds a tile's products of every pair of rows to the sums of `no_pairs`."""
    VECTOR: tl.constexpr = 128 // ELEMENT.primitive_bitwidth if ALIGNED else 1
    REAL: tl.constexpr = tl.float64 if tl.float64 == ELEMENT else tl.float32
    place = tl.arange(0, COLUMNS // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    for chain in range(0, length, CHAIN * COLUMNS):
        short = ()
        for _ in tl.static_range(ROWS * (ROWS + 1) // 2):
            short = short + (tl.full([COLUMNS // VECTOR], 0.0, REAL),)
        for offset in range(chain, min(length, chain + CHAIN * COLUMNS), COLUMNS):
            values = ()
            for row in tl.static_range(ROWS):
                pointer = pointer_to(addresses, row, count, start, ELEMENT, ALIGNED)
                inside = offset + place < nothing_unless(row < count, length, ALIGNED)
                value = tl.load(pointer + (offset + place), mask=inside, other=0.0)
                values = values + (value.to(REAL),)
            longer = ()
            for j in tl.static_range(ROWS):
                for i in tl.static_range(j + 1):
                    products = tl.sum(values[i] * values[j], axis=1)
                    longer = longer + (short[j * (j + 1) // 2 + i] + products,)
            short = longer
        added = ()
        for pair in tl.static_range(ROWS * (ROWS + 1) // 2):
            added = added + (sums[pair] + short[pair].to(tl.float64),)
        sums = added
    return sums


@triton.jit
def store_pairs(sums, partial, count, ROWS: tl.constexpr):
    """Writes the upper triangle of a partial Gram."""
    for j in tl.static_range(ROWS):
        for i in tl.static_range(j + 1):
            tl.store(partial + i * count + j, tl.sum(sums[j * (j + 1) // 2 + i]), mask=j < count)


@triton.jit
def add_products(
    total, addresses, count, start, length,
    ELEMENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Adds a tile's products of every pair of rows to `total`, `[ROWS, ROWS]` float64."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    pointers = pointer_to(addresses, row, count, start, ELEMENT, ALIGNED)[:, None]
    for offset in range(0, length, COLUMNS):
        inside = (row < count)[:, None] & (offset + column < length)[None, :]
        values = tl.load(pointers + (offset + column)[None, :], mask=inside, other=0.0)
        total += products_of(values, ROWS, COLUMNS, INTERPRETED)
    return total


@triton.jit
def products_of(values, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Returns `values @ values.T`.

    The tensor cores' sums of 16-bit rows take COLUMNS <= 256 products, 16 at a time, and each addition truncates to
    24 bits at worst: |dG_ij| <= 16 * 2^-22 sqrt(G_ii G_jj) < 4e-6.
    """
    if INTERPRETED:
        # Its dot multiplies the bit patterns of bfloat16, and sums a pair in an order that depends on its place.
        wide = values if values.dtype == tl.float64 else values.to(tl.float32)
        result = tl.sum(wide[:, None, :] * wide[None, :, :], axis=2)
    elif values.dtype == tl.float32 and COLUMNS > DOT_CHAIN:
        parts = tl.reshape(values, [ROWS, COLUMNS // DOT_CHAIN, DOT_CHAIN])
        products = tl.dot(
            tl.permute(parts, (1, 0, 2)), tl.permute(parts, (1, 2, 0)), input_precision="ieee", out_dtype=tl.float32
        )
        result = tl.sum(products.to(tl.float64), axis=0)
    elif values.dtype == tl.float64:
        result = tl.dot(values, tl.trans(values), out_dtype=tl.float64)
    else:
        result = tl.dot(values, tl.trans(values), input_precision="ieee", out_dtype=tl.float32)
    return result.to(tl.float64)


@triton.jit
def store_products(total, partial, count, ROWS: tl.constexpr):
    """Writes a partial Gram."""
    row = tl.arange(0, ROWS)
    inside = (row < count)[:, None] & (row < count)[None, :]
    tl.store(partial + row[:, None] * count + row[None, :], total, mask=inside)


@triton.jit(do_not_specialize=ARGUMENTS)
def add_partials_kernel(partials, first, gram, count, cells, parts, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Adds up row i of the partial Grams of a cell: program (cell, i).

    first: `[parts, cells + 1]` int64, where each cell's partials begin in each of the parts. gram: `[cells, count,
    count]` float64. Only the upper triangle of partials is read, so that the Gram is symmetric to the bit.
    """
    cell = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1)
    j = tl.arange(0, ROWS)
    pair = tl.minimum(i, j) * count + tl.maximum(i, j)
    depth = tl.arange(0, DEPTH)
    sums = tl.zeros([DEPTH, ROWS], tl.float64)
    for part in range(parts):
        begin = tl.load(first + part * (cells + 1) + cell)
        end = tl.load(first + part * (cells + 1) + cell + 1)
        for base in range(begin, end, DEPTH):
            slot = base + depth
            inside = (slot < end)[:, None] & (j < count)[None, :]
            sums += tl.load(partials + slot[:, None] * count * count + pair[None, :], mask=inside, other=0.0)
    tl.store(gram + (cell * count + i) * count + j, tl.sum(sums, axis=0), mask=j < count)
