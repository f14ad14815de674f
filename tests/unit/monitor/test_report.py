"""Reports of synthetic runs: whole, killed, averaging, hostile names; and the plots in them."""

import base64
import html
import json
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch

from bucketmoo_ds.apps.monitor import plots
from bucketmoo_ds.apps.monitor.history import Curve, load, mean_curve
from bucketmoo_ds.apps.monitor.records import MetricsError
from bucketmoo_ds.apps.monitor.report import write_report
from bucketmoo_ds.apps.monitor.statistics import conflict_statistics
from bucketmoo_ds.apps.monitor.writer import JsonLinesWriter

HOSTILE = '<script>alert("x")</script> & $\\frac{1$'


def write_run(
    folder: Path, languages: list[str], blocks: list[str], steps: int = 6, *, evals: bool = True, end: bool = True
) -> None:
    """A run with random rows; no blocks means averaging. Step 2 is skipped, and blamed on the first language."""
    K, B = len(languages), len(blocks)
    with JsonLinesWriter(folder / "metrics.jsonl", detail_every=2) as writer:
        writer.write(
            {
                "event": "run",
                "time": "2026-11-21T00:00:00Z",
                "aggregator": "mgda" if blocks else "averaging",
                "granularity": "layer",
                "languages": languages,
                "world_size": 2,
                "micro_steps": 4,
                "mode": "deferred" if blocks else "plain",
                "blocks": blocks,
                "config": {"learning_rate": 0.004},
                "versions": {"torch": torch.__version__},
            }
        )
        for step in range(1, steps + 1):
            losses = (5 / step + torch.rand(K)).tolist()
            record: dict[str, Any] = {
                "event": "step",
                "step": step,
                "loss": sum(losses) / K,
                "learning_rate": 1e-3,
                "grad_norm": 1.0,
                "seconds": 0.5,
                "tokens": 100 * K,
                "skipped": step == 2,
                "nonfinite": [[languages[0], "bucket 0"]] if step == 2 else [],
                "language_loss": dict(zip(languages, losses, strict=True)),
                "language_tokens": dict.fromkeys(languages, 100),
            }
            if blocks and writer.wants_detail(step):
                rows = torch.randn(B, K, 8, dtype=torch.float64)
                mask = torch.ones(B, K, dtype=torch.bool)
                mask[:, -1] = step % 4 == 1
                weights = torch.full((B, K), 1 / K)
                record |= conflict_statistics(rows @ rows.mT, mask, weights).detail(languages)
            writer.write(record)
            if evals and step % 3 == 0:
                writer.write({"event": "eval", "step": step, "bits_per_byte": dict.fromkeys(languages, 3.0 / step)})
        if end:
            writer.write({"event": "end", "step": steps, "seconds": 75.0, "counters": {"bytes_sent": 1234567}})


def text_of(page: Path) -> str:
    """What a reader sees, with the entities resolved."""
    shown = re.sub(r"<style>.*?</style>|<[^>]*>", " ", page.read_text(encoding="utf-8"), flags=re.S)
    return re.sub(r"\s+", " ", html.unescape(shown))


def embedded(page: Path) -> list[bytes]:
    return [base64.b64decode(code) for code in re.findall(r"data:image/png;base64,([^\"]+)", page.read_text())]


def test_a_whole_run(tmp_path: Path) -> None:
    write_run(tmp_path, ["de", "fr", "es"], ["embedding", "layer 0", "head"])
    (tmp_path / "command.txt").write_text("bucketmoo train --out <here>")
    (tmp_path / "config.json").write_text('{"a": "b"}')
    page = write_report(tmp_path)
    text = text_of(page)
    assert page == tmp_path / "report.html"
    for fact in ("optimizer steps 6", "tokens 1,800", "time 1 min 15 s", "skipped steps 1", "rows not finite 1"):
        assert fact in text
    for words in ("de (1)", "bytes_sent 1,234,567", "bucketmoo train --out <here>", '{"a": "b"}', "1.000 0.500"):
        assert words in text
    for row in ("de, fr", "de, es", "fr, es", "embedding"):
        assert row in text
    stored = {path.name: path.read_bytes() for path in (tmp_path / "plots").iterdir()}
    assert sorted(stored) == ["bits_per_byte.png", "cosine.png", "loss.png", "weights.png"]
    assert sorted(embedded(page)) == sorted(stored.values())
    assert "http" not in page.read_text()


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    write_run(tmp_path, ["de", "fr"], ["head"])
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


def test_a_killed_run_without_evaluation(tmp_path: Path) -> None:
    write_run(tmp_path, ["de", "fr"], ["model"], evals=False, end=False)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    text = text_of(write_report(tmp_path))
    assert "optimizer steps 5" in text
    assert "killed, or is still going" in text and "No evaluation was written" in text
    assert not (tmp_path / "plots" / "bits_per_byte.png").exists()


@pytest.mark.parametrize("lines", [0, 1])
def test_a_run_killed_before_its_first_step(tmp_path: Path, lines: int) -> None:
    write_run(tmp_path, ["de", "fr"], ["model"])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:lines]))
    text = text_of(write_report(tmp_path))
    assert "There is no step" in text and "no step with weights and cosines" in text


def test_an_averaging_run_has_no_conflicts_and_says_why(tmp_path: Path) -> None:
    write_run(tmp_path, ["de", "fr"], [])
    assert "this run averages" in text_of(write_report(tmp_path))
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["bits_per_byte.png", "loss.png"]


def test_a_plot_of_an_earlier_report_does_not_stay(tmp_path: Path) -> None:
    write_run(tmp_path, ["de", "fr"], [])
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "cosine.png").write_bytes(b"old")
    write_report(tmp_path)
    assert not (tmp_path / "plots" / "cosine.png").exists()


def test_names_are_escaped(tmp_path: Path) -> None:
    write_run(tmp_path, [HOSTILE, "fr"], ["<b>block</b>", "head"], steps=3)
    (tmp_path / "command.txt").write_text("</pre><script>")
    page = write_report(tmp_path)
    assert "<script" not in page.read_text() and "<b>" not in page.read_text()
    assert HOSTILE in text_of(page) and "<b>block</b>" in text_of(page)


def comparison(folder: Path, **changes: Any) -> None:
    languages = ["de", "fr", "pl"]
    values = {
        method: {str(seed): {name: base + seed + i for i, name in enumerate(languages)} for seed in (0, 1)}
        for method, base in (("averaging", 2.0), ("mgda", 2.25))
    }
    results = {
        "title": "Trial <1>",
        "unit": "bits per byte",
        "baseline": "averaging",
        "methods": ["averaging", "mgda"],
        "seeds": [0, 1],
        "seen": ["de", "fr"],
        "unseen": ["pl"],
        "values": values,
        "seconds": {"averaging": {"0": 10.0}},
        "base": {"de": 5.0, "fr": 6.0, "pl": 7.0},
        "provenance": {"corpus": "a <corpus>"},
        "command": "bucketmoo quickstart",
        "machine": {"cpu": "two cores"},
        "versions": {"torch": torch.__version__},
    } | changes
    (folder / "results.json").write_text(json.dumps(results))


def test_a_comparison_in_which_moo_loses(tmp_path: Path) -> None:
    comparison(tmp_path)
    for method in ("averaging", "mgda"):
        for seed in (0, 1):
            blocks = ["head"] if method == "mgda" else []
            write_run(tmp_path / "runs" / f"{method}-seed{seed}", ["de", "fr"], blocks, steps=3)
    page = write_report(tmp_path)
    text = text_of(page)
    assert "No method was better than averaging in every seed on the seen languages." in text
    assert "mgda: NOT better than averaging: worse by 0.250 ± 0.000 bits per byte, better in 0 of 2 seeds" in text
    assert "Trial <1>" in text and "a <corpus>" in text and "two cores" in text and "bucketmoo quickstart" in text
    assert '<td class="best">2.500</td>' in page.read_text()
    # Conflicts and weights are shown for the method that resolves; averaging has none.
    shown = {"differences", "bits_per_byte", "loss", "mgda-cosine", "mgda-weights"}
    assert {path.stem for path in (tmp_path / "plots").glob("*.png")} == shown
    assert len(embedded(page)) == len(shown)


def test_a_comparison_killed_midway(tmp_path: Path) -> None:
    comparison(tmp_path, values={"averaging": {"0": {"de": 2.0, "fr": 2.0}}}, seconds={}, base={})
    write_run(tmp_path / "runs" / "averaging-seed0", ["de", "fr"], [], evals=False, end=False)
    text = text_of(write_report(tmp_path))
    assert "no curve: averaging-seed1, mgda-seed0, mgda-seed1" in text
    assert "averaging: finished 1 of 2 seeds" in text and "mgda: no result that could be compared" in text


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"results\.json .* or metrics\.jsonl"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(MetricsError, match=r"results\.json: not JSON"):
        write_report(tmp_path)


@pytest.mark.parametrize(("K", "B"), [(2, 1), (12, 300)])
def test_plots_have_a_bearable_size(tmp_path: Path, K: int, B: int) -> None:
    languages = [f"language {k}" for k in range(K)]
    blocks = [f"a.rather.long.prefix.layers.{b}.weight" for b in range(B)]
    cosine = np.random.default_rng().uniform(-1, 1, (B, K, K))
    cosine[0] = np.nan if B > 1 else cosine[0]
    weights = np.random.default_rng().dirichlet(np.ones(K), (50, B))
    steps = np.arange(50)
    drawn = [
        plots.cosine_heatmap(cosine, languages, blocks),
        plots.weights_over_time(steps, weights, languages, blocks),
        plots.language_curves({"x": Curve(steps, weights[:, 0, 0])}, "title", "unit"),
    ]
    for index, png in enumerate(drawn):
        assert png is not None
        path = tmp_path / f"{index}.png"
        path.write_bytes(png)
        height, width, _ = matplotlib.image.imread(path).shape
        assert 300 < height < 1500 and 400 < width < 2600


def test_names_at_the_ends_of_lines_keep_their_distance() -> None:
    wanted = sorted(np.random.default_rng().uniform(0, 1, 12).tolist())
    placed = plots._spread(wanted, 0.05)
    # 1e-9: twelve additions of numbers below 1.
    assert min(np.diff(placed)) >= 0.05 - 1e-9
    assert placed[0] >= -1e-9 and placed[-1] <= 1 + 1e-9
    assert plots._spread([0.1, 0.5, 0.9], 0.05) == [0.1, 0.5, 0.9]


def test_history_averages_what_is_known_and_skips_details_of_other_blocks(tmp_path: Path) -> None:
    write_run(tmp_path, ["de", "fr"], ["a", "b"], steps=2, evals=False, end=False)
    with JsonLinesWriter(tmp_path / "metrics.jsonl", detail_every=1, resume_from_step=0) as writer:
        base = {"event": "step", "loss": None, "learning_rate": None, "grad_norm": None, "seconds": 1.0, "tokens": 1}
        base |= {"skipped": False, "nonfinite": [], "language_loss": {"de": None}, "language_tokens": {}}
        details: list[Any] = [
            [[[1, 0.5], [0.5, 1]]],
            [[[1, 0.2], [0.2, 1]], [[1, None], [None, 1]]],
            [[[1, -0.4], [-0.4, 1]], [[1, -1], [-1, 1]]],
        ]
        for step, cosine in enumerate(details, start=1):
            writer.write(base | {"step": step, "cosine": cosine, "conflict": [0.5] * len(cosine)})
    run = load(tmp_path / "metrics.jsonl")
    assert run.cosine[:, 0, 1] == pytest.approx([-0.1, -1.0])
    assert run.conflict == pytest.approx([0.5, 0.5])
    assert run.loss("de").steps.size == 0


def test_mean_curve_takes_the_steps_that_all_seeds_have() -> None:
    one = Curve(np.array([1, 2, 3]), np.array([1.0, 2.0, 3.0]))
    two = Curve(np.array([2, 3, 4]), np.array([4.0, 9.0, 1.0]))
    mean, low, high = mean_curve([one, two])
    assert (mean.steps.tolist(), mean.values.tolist()) == ([2, 3], [3.0, 6.0])
    assert (low.tolist(), high.tolist()) == ([2.0, 3.0], [4.0, 9.0])
