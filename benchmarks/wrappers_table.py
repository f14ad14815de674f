"""Renders a result of the wrapper benchmark as Markdown."""

from __future__ import annotations

from typing import Any

import step_table

from bucketmoo_ds.apps.bench import provenance
from bucketmoo_ds.apps.markdown import table

PLACE = {"wrapper": "wrapper", **step_table.PLACE}


def render(result: dict[str, Any]) -> str:
    """Returns the tables of time and memory, and of bytes, with where they come from and how to read them."""
    lines = [
        f"Over gloo on one machine, {step_table.described(result)} Buckets are layers under FSDP, and of an eighth of "
        "the model under DDP. `once a window`: gradients are exchanged once a window, for each rank adds up its "
        "micro-steps: the plain wrapper without synchronisation, bucket_moo with `once_a_window`.",
        "",
        f"{provenance.headline(result)}; `{result['command']}`",
        "",
        *step_table.tables(
            result,
            PLACE,
            plain="the plain wrapper",
            gradients="FSDP's reduce-scatter and DDP's all-reduce, or the rows and combined pieces of bucket_moo",
        ),
    ]
    return "\n".join(lines)


def summary(result: dict[str, Any]) -> str:
    """Returns one short table: what MGDA costs over the plain wrapper, in float32."""
    head = ("wrapper", "W", "arm (K languages, M micro-steps)", *step_table.RATIOS)
    rows = step_table.ratios(result, ("wrapper", "world_size"))
    return "\n".join([f"{provenance.headline(result)}.", "", *table(head, rows)])
