"""Renders the lines of a kernel benchmark: for a terminal, and as Markdown for the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import rich.table

from bucketmoo_ds.apps.bench import provenance
from bucketmoo_ds.apps.bench.cases import OPS

PEERS = {"torch": "torch", "compile": "torch.compile", "torchjd": "TorchJD", "separate": "gram, min_norm, combine"}

READ = (
    "Milliseconds are medians with 20th to 80th percentile. GB/s counts what the op must move; x floor is its time by "
    "that of a large copy of as many bytes on the same threads or device (1 is the floor). x torch and the like are "
    "the peer's time by ours: above 1, ours is faster; torch multiplies in the rows' dtype and is not as accurate. All "
    "calls of a line took turns, and every ratio is the median of the ratios within a turn."
)


def to_markdown(result: Mapping[str, Any]) -> str:
    """Returns a table for each op, with where the numbers come from and how to read them.

    Args:
        result: what `bucketmoo bench kernels --json` prints.
    """
    parts = [f"{origin(result)}; `{result['command']}`", READ]
    for op in OPS:
        lines = [line for line in result["lines"] if line["op"] == op]
        if lines:
            head, rows = columns(lines)
            body = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
            parts += [f"### {op}", "\n".join(body)]
    parts += [f"Left out: {sentence}." for sentence in result["left_out"]]
    parts += [f"Skipped: {sentence}." for sentence in result["skipped"]]
    return "\n\n".join(parts)


def to_rich(lines: Sequence[Mapping[str, Any]]) -> rich.table.Table:
    """Returns one table of all lines."""
    head, rows = columns(lines)
    table = rich.table.Table("op", *head)
    for line, row in zip(lines, rows, strict=True):
        table.add_row(line["op"], *row)
    return table


def columns(lines: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Returns the head and the cells, without the peers that no line has."""
    shown = [name for name in PEERS if any(line[f"vs_{name}"] is not None for line in lines)]
    head = ["backend", "dtype", "K", "S", "segments", "B", "ms", "GB/s", "x floor"]
    head += [f"x {PEERS[name]}" for name in shown]
    return head, [_cells(line, shown) for line in lines]


def origin(result: Mapping[str, Any]) -> str:
    """Returns one line that says where the numbers come from."""
    return f"{provenance.headline(dict(result))}; {threads_text(result)}"


def threads_text(result: Mapping[str, Any]) -> str:
    """Returns how many threads of the CPU torch and the kernels had."""
    return f"{result['threads']} thread{'s' * (result['threads'] > 1)}"


def _cells(line: Mapping[str, Any], shown: Sequence[str]) -> list[str]:
    warm = " (in cache)" * (line["cache"] == "warm")
    return [
        line["backend"],
        line["dtype"],
        str(line["K"]),
        f"{line['S']:.3g}".replace("e+0", "e") if line["S"] else "",
        str(line["segments"] or ""),
        str(line["B"]),
        f"{line['p50_ms']:.3g} ({line['p20_ms']:.3g} to {line['p80_ms']:.3g})",
        "" if line["gb_per_s"] is None else f"{line['gb_per_s']:.3g}",
        "" if line["times_floor"] is None else f"{line['times_floor']:.2f}{warm}",
        *("" if (ratio := line[f"vs_{name}"]) is None else f"{ratio:.3g}" for name in shown),
    ]
