"""What is measured: the cases of a sweep, and the bytes that each has to move at least."""

from __future__ import annotations

import dataclasses
import itertools

import torch

from bucketmoo_ds.errors import ConfigError

OPS = ("gram", "combine", "accumulate_gram", "min_norm", "resolve")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
WHOLE = 0  # as a length of segments: one segment, the whole shard
MOST_BLOCKS = 16  # of a shard that is cut into segments; a block then has segments all over it

LANGUAGES = {"short": (2, 8, 32), "full": (2, 4, 8, 16, 32, 64)}
ROW_DTYPES = {"short": ("fp32", "bf16"), "full": ("fp32", "bf16", "fp16")}
ELEMENTS = {
    ("short", "cpu"): (10_000_000,),
    ("full", "cpu"): (1_000_000, 10_000_000),
    # The small one stays in the L2 cache of a GPU between the two passes of resolve.
    ("short", "cuda"): (1_000_000, 100_000_000),
    ("full", "cuda"): (1_000_000, 10_000_000, 100_000_000),
}
# K * K * S of a short run on a CPU, at most: with more languages, shards are shorter. The peers set the limit, which
# multiply matrices of this size.
SHORT_PRODUCTS = 1_280_000_000
SEGMENTS = (WHOLE, 4096)
CUT_OPS = ("gram", "combine")  # of a short run on segments: the others are made of these
BLOCKS = {"short": (1,), "full": (1, 64)}  # of min_norm
# B of one more min_norm at K = 16. 512: a model of a few billion parameters, cut into layers' matrices; it takes
# TorchJD four seconds on a CPU.
MANY_BLOCKS = {("short", "cpu"): 64, ("full", "cpu"): 512, ("short", "cuda"): 512, ("full", "cuda"): 512}
MANY_BLOCKS_LANGUAGES = 16


@dataclasses.dataclass(frozen=True)
class Case:
    """One op on one shape.

    Attributes:
        op: one of `OPS`.
        dtype: of the rows, a key of `DTYPES`; of the incoming gradients where rows are accumulated, which are float32;
            fp64 for min_norm.
        languages: K.
        elements: S; 0 for min_norm.
        segment: elements of each segment, or `WHOLE`.
        num_blocks: B.
    """

    op: str
    dtype: str
    languages: int
    elements: int
    segment: int
    num_blocks: int

    @property
    def segments(self) -> int:
        """How many segments the shard has."""
        if self.op == "min_norm":
            return 0
        return 1 if self.segment == WHOLE else self.elements // self.segment

    @property
    def row_bytes(self) -> int:
        """Bytes of the K rows in the case's dtype."""
        return self.languages * self.elements * DTYPES[self.dtype].itemsize

    def fits_cache(self, cache: int) -> bool:
        """Whether the rows that one pass has read are still in a cache of so many bytes in the next."""
        return self.row_bytes <= cache

    def floor_bytes(self, cache: int) -> int | None:
        """Returns what must go to and from memory: each operand once, the rows of `resolve` twice unless they stay in
        cache; `None` for `min_norm`, which moves next to nothing."""
        result = self.elements * DTYPES[self.dtype].itemsize
        match self.op:
            case "gram":
                return self.row_bytes
            case "combine":
                return self.row_bytes + result
            case "accumulate_gram":
                return self.row_bytes + 2 * self.languages * self.elements * torch.float32.itemsize
            case "resolve":
                return (1 if self.fits_cache(cache) else 2) * self.row_bytes + result
            case _:
                return None

    def needed_bytes(self) -> int:
        """Returns an upper bound of the memory that the case takes, with the peers' stacked copy of the rows."""
        rows = self.languages * self.elements * torch.float32.itemsize
        if self.op == "accumulate_gram":
            return 2 * rows + self.row_bytes
        grams = self.num_blocks * self.languages**2 * torch.float64.itemsize
        return 2 * self.row_bytes + 2 * self.elements * DTYPES[self.dtype].itemsize + 2 * grams

    def __str__(self) -> str:
        if self.op == "min_norm":
            return f"min_norm K={self.languages} B={self.num_blocks}"
        cut = "" if self.segment == WHOLE else f", {self.segments} segments of {self.segment}"
        return f"{self.op} {self.dtype} K={self.languages} S={self.elements}{cut}"


def plan(
    *,
    full: bool,
    device: torch.device,
    ops: tuple[str, ...] = OPS,
    dtypes: tuple[str, ...] = (),
    languages: tuple[int, ...] = (),
    elements: tuple[int, ...] = (),
    segments: tuple[int, ...] = (),
) -> list[Case]:
    """Returns the cases of a sweep, those that share rows near each other.

    Args:
        full: all K, S and dtypes, and segments for each; else few, and segments and `accumulate_gram` for one K.
        device: sizes differ between CPU and GPU.
        ops, dtypes, languages, elements, segments: instead of the plan's own, where given.

    Raises:
        ConfigError: a segment is longer than a shard.
    """
    size = "full" if full else "short"
    counts = languages or LANGUAGES[size]
    shards = elements or ELEMENTS[size, device.type]
    middle = counts[len(counts) // 2]

    def is_shown(op: str, count: int, segment: int) -> bool:
        if full:
            return True
        # What segments cost, and what is gained by taking the Gram on the way, one K shows.
        if segment != WHOLE and not segments and (op not in CUT_OPS or count != middle):
            return False
        return bool(languages) or op != "accumulate_gram" or count == middle

    cases = []
    if "min_norm" in ops:
        many = MANY_BLOCKS[size, device.type]
        shapes = [(blocks, count) for blocks in BLOCKS[size] for count in counts]
        shapes += [(many, count) for count in languages or (MANY_BLOCKS_LANGUAGES,)]
        cases += [Case("min_norm", "fp64", count, 0, WHOLE, blocks) for blocks, count in dict.fromkeys(shapes)]
    limited = not full and not elements and device.type == "cpu"
    # The largest K last: where time runs out, no dtype is missing altogether.
    for longest, count, dtype, segment in itertools.product(
        shards, counts, dtypes or ROW_DTYPES[size], segments or SEGMENTS
    ):
        shard = min(longest, SHORT_PRODUCTS // count**2) if limited else longest
        if segments and segment > shard:
            raise ConfigError(f"--segment {segment}: longer than a shard of {shard}; --numel gives longer ones")
        pieces = shard // segment if segment else 1
        shard, blocks = pieces * segment or shard, min(MOST_BLOCKS, pieces)
        wanted = [op for op in ops if op != "min_norm" and pieces and is_shown(op, count, segment)]
        cases += [Case(op, dtype, count, shard, segment, blocks) for op in wanted]
    return cases
