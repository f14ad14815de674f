"""`bucketmoo simulate`: nothing dominates a front, runs are the package's own, and they end where theory says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from draw import SEED
from torch import Tensor, nn

import bucketmoo_ds as bm
from bucketmoo_ds.apps.cli.main import main
from bucketmoo_ds.apps.simulate.problems import OBJECTIVES, PROBLEMS, Problem, problem_of, spans
from bucketmoo_ds.apps.simulate.run import blocks_of, descend


@pytest.mark.parametrize("name", PROBLEMS)
def test_nothing_dominates_the_front(name: str) -> None:
    """Neither a point of a grid, for the toy, nor any that was drawn; and what lies on it or beside it has the distance
    that it has."""
    problem = problem_of(name, SEED)
    generator = torch.Generator().manual_seed(SEED)
    if name == "conflict":
        axis = torch.linspace(-14.0, 14.0, 400, dtype=torch.float64)
        tried = problem.losses(torch.cartesian_prod(axis, axis)).unsqueeze(1).expand(-1, len(problem.starts), -1)
    else:
        drawn = torch.randn(3000, *problem.starts.shape, generator=generator, dtype=torch.float64)
        scales = 2 * torch.rand(3000, 1, 1, generator=generator, dtype=torch.float64)
        tried = torch.stack([problem.losses(each) for each in drawn * scales])
    for run, front in enumerate(problem.front):
        for point in front[::100]:
            # The root is found to 2^-50 of 4, where the losses are flat.
            assert not (tried[:, run] < point - 1e-9).all(-1).any(), f"BUCKETMOO_TEST_SEED={SEED}"
    middle = problem.front[:, 1000]
    assert problem.distance(middle).max() <= 1e-12
    # On a convex front the nearest to the corner that lies above and right of it is no farther than the corner's point.
    assert (problem.distance(middle + 0.1) <= 0.1 * 2**0.5 + 1e-12).all()
    assert (problem.distance(middle + 0.1) > 1e-3).all()


class Module(nn.Module):
    """The numbers of a problem's first start, as a model."""

    def __init__(self, problem: Problem, start: int) -> None:
        super().__init__()
        self.problem, self.start = problem, start
        parts = [problem.starts[start, begin:end] for begin, end in spans(problem.sizes)]
        self.x = nn.ParameterList(nn.Parameter(part.clone()) for part in parts)

    def forward(self) -> Tensor:
        points = self.problem.starts.clone()
        points[self.start] = torch.cat(list(self.x))
        return self.problem.losses(points)[self.start]


@pytest.mark.parametrize(
    ("name", "granularity"), [("structured", "refined"), ("quadratics", "parameter"), ("quadratics", "bucket")]
)
def test_a_run_is_that_of_a_session(name: str, granularity: str) -> None:
    problem, steps, start = problem_of(name, SEED), 6, 1
    plan = blocks_of(problem, granularity)
    run = descend(problem, "mgda", plan, steps=steps)
    model = Module(problem, start)
    options = {"used_by": problem.used_by, "base": "parameter"} if granularity == "refined" else {}
    config = bm.BucketMOOConfig(
        languages=OBJECTIVES, aggregator="mgda", granularity=granularity, granularity_options=options
    )
    session = bm.single.register(model, config, micro_steps=2, bucket_size=problem.bucket_size)
    assert session.moo.plan == plan
    optimizer = torch.optim.SGD(model.parameters(), lr=problem.rate)
    path = [problem.losses(problem.starts)[start]]
    for _ in range(steps):
        for objective, language in enumerate(OBJECTIVES):
            with session.language(language, target_tokens=1):
                loss = model()[objective]
            (loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            path.append(model())
    # The session keeps rows in float32: a rounding of 2^-24 a step and gradient.
    torch.testing.assert_close(run.path[:, start], torch.stack(path)[run.steps], rtol=1e-5, atol=1e-5)


def test_blocks_stop_where_the_whole_would_go_on() -> None:
    """The counterexample: at its first start each number alone is stationary, and the whole has a direction."""
    problem = problem_of("counterexample", 0)
    apart, whole = (descend(problem, "mgda", blocks_of(problem, each), steps=120) for each in ("parameter", "model"))
    # A solver's rounding, a hundred times.
    assert (apart.path[-1, 0] - apart.path[0, 0]).abs().max() <= 1e-12
    assert apart.blocks[0] <= 1e-12
    assert apart.whole[0] == pytest.approx(13**-0.5, rel=1e-9)
    assert apart.distance[0] == problem.distance(problem.losses(problem.starts))[0] > 0.05
    assert whole.distance.max() <= 2e-3


def test_refined_reaches_the_front_where_others_stand_still() -> None:
    """The first start: the first objective is at its optimum, so that the whole is Pareto stationary, the point of its
    hull that is 0 being a zero row. `parameter` is stopped everywhere by those who use nothing there."""
    problem = problem_of("structured", SEED)
    runs = {name: descend(problem, "mgda", blocks_of(problem, name), steps=120) for name in
            ("parameter", "model", "refined")}  # fmt: skip
    for name in ("parameter", "model"):
        assert runs[name].distance[0] > 5, name
        assert runs[name].blocks[0] == 0.0, name
    assert runs["model"].whole[0] == 0.0
    assert runs["refined"].distance.max() <= 2e-3
    assert runs["refined"].whole.max() <= 1e-3


def simulate(*words: str) -> object:
    with pytest.raises(SystemExit) as ended:
        main(["simulate", *words])
    return ended.value.code


def test_the_command_writes_what_it_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--problems", "structured", "--aggregators", "mgda,random", "--steps", "4", "--noise", ".3")
    assert simulate(*words, "--seed", str(SEED), "--out", str(tmp_path / "new")) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "new" / "simulate.json").read_text())
    assert [(run["granularity"], run["rule"]) for run in found["runs"]] == [
        (granularity, rule) for granularity in ("parameter", "model", "refined") for rule in ("mgda", "random")
    ]
    assert (tmp_path / "new" / "simulate-structured.png").stat().st_size > 10_000
    (line,) = [line for line in shown.splitlines() if "refined" in line]
    for run in found["runs"][-2:]:
        assert f" {max(run['distance']):.2g} (" in line
    assert simulate(*words, "--seed", str(SEED)) == 0
    assert capsys.readouterr().out == shown
    assert simulate(*words, "--seed", str(SEED + 1)) == 0
    assert capsys.readouterr().out != shown
    assert simulate("--problems", "counterexample", "--granularities", "refined") == 0
    assert "counterexample: refined is model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--problems", "conflicts"), 'problem "conflicts": unknown, expected one of "conflict", '),
        (("--aggregators", "mdga"), '--aggregators: aggregator = "mdga": unknown'),
        (("--granularities", "layers"), 'bucket_moo.granularity = "layers": unknown'),
        (("--steps", "0"), "--steps 0: expected at least 1"),
        (("--noise", "-1"), "--noise and --seed: expected numbers, 0 or more"),
    ],
)
def test_bad_values_are_one_line(words: tuple[str, str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"bucketmoo: {said}")
