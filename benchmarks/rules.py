"""Times every rule on a window's Grams, all blocks at once, beside TorchJD's block by block.

    OMP_NUM_THREADS=1 python benchmarks/rules.py --out benchmarks/results/rules-speed-cpu.json

One thread. It needs `torchjd[cagrad,quadprog_projector]`. Grams are those of random rows with a common part, as
languages have. Calls take turns, so that the same noise meets all of them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bucketmoo_ds import aggregate
from bucketmoo_ds.apps.bench import provenance
from bucketmoo_ds.apps.bench.timing import Stopwatch, take_turns
from bucketmoo_ds.apps.markdown import table

# What TorchJD calls the same method.
PEERS = {
    "mgda": "MGDA", "upgrad": "UPGrad", "dualproj": "DualProj", "pcgrad": "PCGrad", "imtl_g": "IMTLG",
    "aligned_mtl": "AlignedMTL", "fairgrad": "FairGrad", "cagrad": "CAGrad",
}  # fmt: skip
CLOSED = ("mean", "static", "random", "adasum", "pcgrad", "gradvac", "imtl_g", "config", "stch", "famo")
GOALS = {True: 2.0, False: 20.0}  # milliseconds: a closed form, a quadratic problem


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=512)
    parser.add_argument("--languages", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=40.0, help="for all of it, about")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = torch.randn(options.blocks, options.languages, 32, generator=torch.Generator().manual_seed(0))
    gram = (rows + rows.mean(1, keepdim=True)).double()
    gram = gram @ gram.mT
    calls = {name: _call(name, gram) for name in aggregate.names()}
    for name in calls.copy():
        peer = _peer(name, gram)
        if peer is not None:
            calls[f"torchjd:{PEERS[name]}"] = peer
    times = take_turns(calls, Stopwatch(torch.device("cpu")), repeats=50, seconds=options.seconds, warm=tuple(calls))
    alone = {name: _call(name, gram[:1]) for name in aggregate.names()}
    one = take_turns(alone, Stopwatch(torch.device("cpu")), repeats=50, seconds=10.0, warm=tuple(alone))
    result = {
        "made_by": provenance.describe(("torch", "torchjd")),
        "blocks": options.blocks,
        "languages": options.languages,
        "rules": {name: _row(name, times, one[name].median) for name in aggregate.names()},
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(render(result))


def render(result: dict[str, Any]) -> str:
    """Returns the table with where it comes from."""
    rows = (
        (
            f"`{name}`",
            f"{found['ms']:.2f}",
            f"{found['goal']:.0f}" + ("" if found["ms"] <= found["goal"] else ", missed"),
            f"{found['one']:.2f}",
            f"{found['torchjd']:.0f} times" if "torchjd" in found else "",
        )
        for name, found in sorted(result["rules"].items(), key=lambda item: item[1]["ms"])
    )
    where = f"one thread, B = {result['blocks']}, K = {result['languages']}"
    head = ("rule", "ms, all blocks", "goal", "ms, one block", "TorchJD block by block")
    return "\n".join([f"{provenance.headline(result['made_by'])}; {where}.", "", *table(head, rows)])


def _call(name: str, gram: Tensor) -> Any:
    languages = [str(language) for language in range(gram.shape[-1])]
    needed = {"static": {"shares": [1.0 + language for language in range(gram.shape[-1])]}, "anchor": {"primary": "0"}}
    rule = aggregate.create(name, **needed.get(name, {}))
    losses = torch.linspace(1.0, 2.0, len(languages), dtype=torch.float64) if rule.uses_losses else None
    rule = rule.at(languages, range(len(languages)), range(len(gram)))
    mask = torch.ones(gram.shape[:2], dtype=torch.bool)
    return lambda: aggregate.solve(gram, mask, rule, losses=losses, generator=torch.Generator().manual_seed(0))


def _peer(name: str, gram: Tensor) -> Any:
    """TorchJD's rule with our options, block by block; `None` where it has none for a Gram alone."""
    from torchjd import aggregation

    if name not in PEERS:
        return None
    options = {"cagrad": {"c": 0.5}, "fairgrad": {"alpha": 1.0}}.get(name, {})
    made = getattr(aggregation, PEERS[name])(**options)
    return lambda: [made.gramian_weighting(block) for block in gram]


def _row(name: str, times: dict[str, Any], alone: float) -> dict[str, float]:
    row = {"ms": times[name].median, "goal": GOALS[name in CLOSED], "one": alone}
    peer = times.get(f"torchjd:{PEERS.get(name)}")
    return row if peer is None else row | {"torchjd": peer.ratio_to(times[name])}


if __name__ == "__main__":
    main()
