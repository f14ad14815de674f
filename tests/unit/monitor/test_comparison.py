"""The comparison of methods on numbers worked out by hand, and on ones that must not make it boast."""

import math
import random
from typing import Any

import pytest
import rich.console
from hypothesis import given, settings
from hypothesis import strategies as st

from bucketmoo_ds.apps.monitor.comparison import Difference, compare
from bucketmoo_ds.apps.monitor.records import MetricsError
from bucketmoo_ds.apps.monitor.tables import NO_SIGNIFICANCE, tables, to_markdown, to_rich


def results(**changes: Any) -> dict[str, Any]:
    """Two seen languages and an unseen one, three seeds. CAGrad gains, MGDA loses, PCGrad does both."""
    averaging = {"0": {"de": 2.0, "fr": 3.0, "pl": 4.0}, "1": {"de": 2.2, "fr": 3.2, "pl": 4.2}}
    averaging["2"] = {"de": 1.8, "fr": 2.8, "pl": 3.8}

    def shifted(*by_seed: tuple[float, float, float]) -> dict[str, dict[str, float]]:
        return {
            seed: {language: averaging[seed][language] + change for language, change in zip(row, changes_, strict=True)}
            for (seed, row), changes_ in zip(averaging.items(), by_seed, strict=True)
        }

    return {
        "title": "Trial",
        "unit": "bits per byte",
        "baseline": "averaging",
        "methods": ["averaging", "mgda", "cagrad", "pcgrad"],
        "seeds": [0, 1, 2],
        "seen": ["de", "fr"],
        "unseen": ["pl"],
        "values": {
            "averaging": averaging,
            "mgda": shifted((0.1, 0.3, 0.1), (0.1, 0.1, 0.1), (0.0, 0.0, 0.1)),
            "cagrad": shifted((-0.2, 0.1, 0.1), (-0.4, 0.1, -0.1), (-0.3, 0.1, -0.3)),
            "pcgrad": shifted((-0.3, -0.3, 0.0), (0.1, 0.1, 0.0), (-0.1, -0.1, 0.0)),
        },
        "seconds": {"averaging": {"0": 10.0, "1": 20.0}},
        "base": {"de": 5.0, "fr": 6.0},
    } | changes


def difference(data: dict[str, Any], method: str, group: int = 0) -> Difference:
    found = {result.method: result.difference for result in compare(data).groups[group].results}[method]
    assert found is not None
    return found


def test_a_winner_by_hand() -> None:
    found = difference(results(), "cagrad")
    assert found.by_seed == pytest.approx({0: -0.05, 1: -0.15, 2: -0.1})
    assert (found.mean, found.deviation, found.better) == pytest.approx((-0.1, 0.05, 3))
    assert (found.worst_language, found.worst_change) == ("fr", pytest.approx(0.1))
    assert found.verdict == (
        "better than averaging in 3 of 3 seeds by 0.100 ± 0.050 bits per byte; fr got worse by 0.100"
    )


def test_a_loser_is_called_one() -> None:
    found = difference(results(), "mgda")
    # Seed 2 is equal: a draw is no win.
    assert (found.mean, found.better, found.outcome) == (pytest.approx(0.1), 0, "not better")
    assert found.verdict == "NOT better than averaging: worse by 0.100 ± 0.100 bits per byte, better in 0 of 3 seeds"


def test_better_on_average_is_not_better() -> None:
    found = difference(results(), "pcgrad")
    assert found.outcome == "mixed"
    assert found.verdict.startswith("NOT clearly better than averaging: better in only 2 of 3 seeds, by 0.100 ± 0.200")


def test_a_method_equal_to_the_baseline_is_not_better() -> None:
    assert difference(results(), "pcgrad", group=1).verdict == (
        "NOT better than averaging: the same on average, better in 0 of 3 seeds"
    )


def test_seen_and_unseen_are_kept_apart() -> None:
    seen, unseen = compare(results()).groups
    assert (seen.name, seen.languages, unseen.name, unseen.languages) == ("seen", ("de", "fr"), "unseen", ("pl",))
    averaging = seen.results[0]
    assert averaging.values == pytest.approx({"de": 2.0, "fr": 3.0})
    assert (averaging.mean, averaging.worst_language, averaging.difference) == (pytest.approx(2.5), "fr", None)
    assert "cagrad, 0.100" in seen.headline and "Not better in every seed: mgda, pcgrad." in seen.headline
    assert unseen.headline == "No method was better than averaging in every seed on the unseen languages."


def test_without_a_winner_the_headline_says_so() -> None:
    data = results(methods=["averaging", "mgda"])
    assert compare(data).groups[0].headline == (
        "No method was better than averaging in every seed on the seen languages."
    )


@pytest.mark.parametrize("lost", [None, math.nan, math.inf, "absent", "no seed", "no method"])
def test_a_lost_run_is_left_out_and_confessed(lost: Any) -> None:
    data = results()
    if lost == "no method":
        del data["values"]["cagrad"]
        assert "cagrad: no result that could be compared with averaging" in tables(compare(data))[0].notes
        return
    if lost == "no seed":
        del data["values"]["cagrad"]["1"]
    elif lost == "absent":
        del data["values"]["cagrad"]["1"]["fr"]
    else:
        data["values"]["cagrad"]["1"]["fr"] = lost
    found = difference(data, "cagrad")
    assert found.by_seed == pytest.approx({0: -0.05, 2: -0.1})
    assert found.verdict.endswith("no pair of results for seed 1")
    assert "in 2 of 2 seeds" in found.verdict


def test_one_seed_has_no_spread() -> None:
    found = difference(results(seeds=[0]), "cagrad")
    assert found.deviation is None
    assert "±" not in found.verdict and found.verdict.endswith("a single seed, so its spread is unknown")


def test_nothing_finished_yet() -> None:
    comparison = compare(results(values={}))
    assert "No method can be compared with averaging" in comparison.groups[0].headline
    assert "averaging: finished 0 of 3 seeds" in to_markdown(comparison)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 5))
def test_the_baseline_against_itself_never_wins(seed: int, count: int) -> None:
    draw = random.Random(seed)
    runs = {str(k): {name: draw.uniform(1, 5) for name in ("de", "fr", "pl")} for k in range(count)}
    data = results(methods=["averaging", "twin"], seeds=list(range(count)), values={"averaging": runs, "twin": runs})
    assert all(
        result.difference is None or result.difference.outcome == "not better"
        for group in compare(data).groups
        for result in group.results
    )


@settings(deadline=None)
@given(seed=st.integers(0, 2**32))
def test_swapping_method_and_baseline_turns_the_sign(seed: int) -> None:
    draw = random.Random(seed)
    values = {
        name: {str(k): {language: draw.uniform(1, 5) for language in ("de", "fr")} for k in range(3)} for name in "ab"
    }
    data = results(methods=["a", "b"], values=values, unseen=[])
    forth, back = difference(data | {"baseline": "a"}, "b"), difference(data | {"baseline": "b"}, "a")
    assert back.mean == pytest.approx(-forth.mean)
    assert back.deviation == pytest.approx(forth.deviation)
    assert back.better == 3 - forth.better


def test_the_table_names_mean_worst_and_best() -> None:
    table = tables(compare(results()))[0]
    rows = {row[0]: row[1:] for row in table.rows}
    assert table.header == ("language", "before training", "averaging", "mgda", "cagrad", "pcgrad")
    assert rows["de"] == ("5.000", "2.000", "2.067", "1.700", "1.900")
    assert rows["worst language"][:3] == ("6.000 (fr)", "3.000 (fr)", "3.133 (fr)")
    assert rows["difference to averaging"] == ("", "-", "+0.100 ± 0.100", "-0.100 ± 0.050", "-0.100 ± 0.200")
    assert rows["seeds in which it was better"] == ("", "-", "0 of 3", "3 of 3", "2 of 3")
    assert rows["worst change of a language"][2:4] == ("+0.133 (fr)", "+0.100 (fr)")
    assert rows["seconds a run"] == ("", "15", "-", "-", "-")
    assert (0, 4) in table.best and (0, 2) not in table.best


def test_markdown_and_terminal_say_the_same_and_escape_names() -> None:
    data = results(title="a|b *c*", seen=["de", "fr"])
    text = to_markdown(compare(data))
    assert "# a\\|b \\*c\\*" in text
    assert "| de | 5.000 | 2.000 | 2.067 | **1.700** | 1.900 |" in text
    console = rich.console.Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(to_rich(compare(results(title="[red]x[/red]"))))
    shown = console.export_text()
    assert "[red]x[/red]" in shown
    verdicts = ("NOT better than averaging: worse by 0.100", "better than averaging in 3 of 3 seeds by 0.100")
    for verdict in (*verdicts, NO_SIGNIFICANCE):
        assert verdict in shown and verdict in text
    assert "significant" not in text.replace(NO_SIGNIFICANCE, "")


@pytest.mark.parametrize(
    ("changes", "message"), [({"baseline": "mean"}, 'baseline = "mean": expected one of'), ({"values": None}, "values")]
)
def test_bad_results_are_named(changes: dict[str, Any], message: str) -> None:
    data = results(**changes)
    if changes.get("values", 0) is None:
        del data["values"]
    with pytest.raises(MetricsError, match=message):
        compare(data)
