"""`granularity: refined`: who uses what, cycles merged, and what the theory says of the points where it stops."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from draw import SEED, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bucketmoo_ds as bm
from bucketmoo_ds import aggregate, ops
from bucketmoo_ds.comm.exchange import Exchange
from bucketmoo_ds.errors import ConfigError
from bucketmoo_ds.pipeline.estimate import GramEstimate
from bucketmoo_ds.plan.blocks import Parameter, granularity_of, plan_blocks
from bucketmoo_ds.plan.refined import merge_cycles

LANGUAGES = ("de", "fr", "it")


def config(used_by: dict[str, Any], **changes: Any) -> bm.BucketMOOConfig:
    options = {"used_by": used_by} | {key: changes.pop(key) for key in ("base",) if key in changes}
    return bm.BucketMOOConfig(
        **{"languages": LANGUAGES, "granularity": "refined", "granularity_options": options} | changes
    )


# --- cycles -------------------------------------------------------------------------------------------------------


def is_forest(users: Sequence[frozenset[int]]) -> bool:
    """Whether taking away nodes of one edge, over and over, takes every edge of the graph of blocks and languages."""
    edges = {(block, language) for block, of in enumerate(users) for language in of}
    while edges:
        blocks, languages = ([edge[end] for edge in edges] for end in (0, 1))
        leaves = {edge for edge in edges if blocks.count(edge[0]) == 1 or languages.count(edge[1]) == 1}
        if not leaves:
            return False
        edges -= leaves
    return True


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for place, group in enumerate(rest):
            yield [*rest[:place], [items[0], *group], *rest[place + 1 :]]


def merged_users(users: Sequence[frozenset[int]], groups: Sequence[Sequence[int]]) -> list[frozenset[int]]:
    return [frozenset().union(*(users[block] for block in group)) for group in groups]


users_lists = st.lists(st.frozensets(st.integers(0, 3), min_size=1), min_size=1, max_size=5)


@settings(deadline=None, max_examples=examples(150))
@given(users=users_lists)
def test_the_merging_is_the_finest_without_a_cycle(users: list[frozenset[int]]) -> None:
    """Of all ways to merge: every one that leaves no cycle merges at least these."""
    numbers = merge_cycles(users)
    ours = [[block for block, of in enumerate(numbers) if of == number] for number in dict.fromkeys(numbers)]
    assert is_forest(merged_users(users, ours))
    for groups in partitions(list(range(len(users)))):
        if is_forest(merged_users(users, groups)):
            assert all(any(set(mine) <= set(group) for group in groups) for mine in ours)


def min_norm_squared(rows: Tensor) -> float:
    """Of rows `[K, S]`, relative to the longest."""
    gram = rows @ rows.T
    weights, _ = ops.min_norm(gram.unsqueeze(0), torch.ones(1, len(rows), dtype=torch.bool), backend="reference")
    return float(weights[0] @ gram @ weights[0] / gram.diagonal().max())


@settings(deadline=None, max_examples=examples(60))
@given(users=users_lists, seed=st.integers(0, 2**32))
def test_refined_stationary_points_are_pareto_stationary(users: list[frozenset[int]], seed: int) -> None:
    """Random gradients that are stationary on every merged block, languages that do not use it left out."""
    numbers = merge_cycles(users)
    groups = [[block for block, of in enumerate(numbers) if of == number] for number in dict.fromkeys(numbers)]
    generator = torch.Generator().manual_seed(seed)
    count = 1 + max(max(of) for of in users)
    rows = torch.zeros(count, len(groups), 4, dtype=torch.float64)
    for block, using in enumerate(merged_users(users, groups)):
        of = sorted(using)
        own = torch.randn(len(of), 4, generator=generator, dtype=torch.float64)
        weights = torch.rand(len(of), generator=generator, dtype=torch.float64)
        weights[torch.rand(len(of), generator=generator) < 0.3] = 0.0  # languages that are at their optimum there, too
        weights[0] += 0.1
        own[0] = -(weights[1:] @ own[1:]) / weights[0]
        rows[of, block] = own
    if rows.flatten(1).norm(dim=1).max() == 0:
        return
    used = rows[[language for language in range(count) if any(language in of for of in users)]]
    # The squares of a hull's points cancel to rounding: a few units of 2^-53 of the longest row's.
    assert min_norm_squared(used.flatten(1)) <= 1e-13


@settings(deadline=None, max_examples=examples(30))
@given(count=st.integers(2, 5), cuts=st.integers(1, 6), seed=st.integers(0, 2**32))
def test_a_pareto_stationary_point_is_stationary_on_every_block(count: int, cuts: int, seed: int) -> None:
    """Of all blocks, where every language uses all."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 12, generator=generator, dtype=torch.float64)
    weights = torch.rand(count, generator=generator, dtype=torch.float64) + 0.05
    rows[0] = -(weights[1:] @ rows[1:]) / weights[0]
    assert min_norm_squared(rows) <= 1e-13  # of the longest row's: a few roundings of 2^-53, squared or not
    for block in rows.tensor_split(cuts, dim=1):
        assert min_norm_squared(block) <= 1e-13


def test_with_a_cycle_they_need_not_be() -> None:
    """Two blocks that both languages use: each is stationary, the whole is not; merged it is not either."""
    one, other = torch.tensor([[1.0, 1.0], [-1.0, -2.0]], dtype=torch.float64)
    for block in range(2):
        # A few roundings of products near 1.
        assert min_norm_squared(torch.stack([one[block : block + 1], other[block : block + 1]])) <= 1e-15
    assert min_norm_squared(torch.stack([one, other])) == pytest.approx(1 / 13 / 5, rel=1e-12)
    assert merge_cycles([frozenset({0, 1})] * 2) == [0, 0]


# --- what it does to training -------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Three objectives on four vectors, objective i on vectors i and i + 1: no cycle, and the two ends are private.

    Each is a strictly convex quadratic of its two vectors.
    """

    def __init__(self, start: Sequence[Tensor], targets: Tensor) -> None:
        super().__init__()
        self.vectors = nn.ParameterList(nn.Parameter(each.clone()) for each in start)
        self.targets = targets  # [3, 2, n]

    def forward(self, objective: int) -> Tensor:
        first, second = self.vectors[objective], self.vectors[objective + 1]
        near = torch.stack([first, second]) - self.targets[objective]
        return near.square().sum() + 0.5 * (first * second).sum()


USED_BY = {"vectors.0": ["de"], "vectors.1": ["de", "fr"], "vectors.2": ["fr", "it"], "vectors.3": ["it"]}


def descend(model: Chain, chosen: bm.BucketMOOConfig, steps: int) -> None:
    """Plain gradient descent on the combined gradient."""
    session = bm.single.register(model, chosen, micro_steps=3, bucket_size=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.35)
    for _ in range(steps):
        for number, language in enumerate(LANGUAGES):
            with session.language(language, target_tokens=1):
                loss = model(number)
            (loss / 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    session.close()


def stationarity(model: Chain) -> dict[str, float]:
    """The square of the min-norm point, of the whole and of each vector with those that do not use it left out."""
    parameters = list(model.vectors)
    rows = torch.stack(
        [
            torch.stack(torch.autograd.grad(model(number), parameters, allow_unused=True, materialize_grads=True))
            for number in range(3)
        ]
    )

    def square(rows: Tensor) -> float:
        gram = (rows @ rows.T).unsqueeze(0)
        weights, _ = ops.min_norm(gram, torch.ones(1, len(rows), dtype=torch.bool), backend="reference")
        return float(weights[0] @ gram[0] @ weights[0])

    found = {"whole": square(rows.flatten(1))}
    for block, users in enumerate(USED_BY.values()):
        found[f"block {block}"] = square(rows[[LANGUAGES.index(name) for name in users], block])
    return found


def chain(of_objective_0: str) -> Chain:
    generator = torch.Generator().manual_seed(SEED)
    start = list(torch.randn(4, 3, generator=generator, dtype=torch.float64))
    targets = torch.randn(3, 2, 3, generator=generator, dtype=torch.float64)
    model = Chain(start, targets)
    if of_objective_0 == "at its optimum":
        descent = torch.optim.SGD([model.vectors[0], model.vectors[1]], lr=0.2)
        for _ in range(300):
            descent.zero_grad()
            model(0).backward()
            descent.step()
        model.zero_grad()
    return model


def test_iterates_reach_refined_pareto_stationarity() -> None:
    """From a start where one objective is at its optimum, so that the whole is Pareto stationary already: `model` stays
    there, and `parameter` in every block that somebody does not use, while `refined` goes on to where every block is
    stationary for those that use it."""
    moved = {}
    for granularity in ("model", "parameter", "refined"):
        model = chain("at its optimum")
        before = [each.detach().clone() for each in model.vectors]
        steps = 100 if granularity == "refined" else 10
        assert stationarity(model)["whole"] <= 1e-20
        assert max(stationarity(model).values()) > 1e-3
        chosen = dataclasses.replace(config(USED_BY), aggregator="mgda")
        if granularity != "refined":
            chosen = bm.BucketMOOConfig(languages=LANGUAGES, aggregator="mgda", granularity=granularity)
        descend(model, chosen, steps)
        moved[granularity] = [
            float((now.detach() - then).norm()) for now, then in zip(model.vectors, before, strict=True)
        ]
        if granularity == "refined":
            # Rows are float32: the gradients of what was near 1 are known to 1e-6.
            assert max(stationarity(model).values()) <= 1e-10, f"BUCKETMOO_TEST_SEED={SEED}"
    # Ten steps of what rounding leaves of a gradient at the optimum.
    assert max(moved["model"]) <= 1e-6
    assert max(moved["parameter"]) <= 1e-6
    assert moved["refined"][3] > 1e-2


def test_with_every_language_on_every_block_refined_is_model() -> None:
    """But for one that is private, all vectors lie on cycles."""
    used_by = {"vectors.3": ["it"]}
    plan = plan_blocks([Parameter(f"vectors.{each}", 3) for each in range(4)], 1, granularity_of(config(used_by)))
    assert plan.blocks == ("vectors.0 + 2 more", "vectors.3")
    assert plan.left_out == ((), (0, 1))


# --- settings -----------------------------------------------------------------------------------------------------

PARAMETERS = [
    *(Parameter(f"layers.{layer}.{name}", 3) for layer in range(2) for name in ("w", "adapters.de.w", "adapters.fr.w")),
    Parameter("head.weight", 4),
]


def test_blocks_of_the_base_are_cut_by_who_uses_them() -> None:
    used_by = {"*.adapters.de.*": ["de"], "*.adapters.fr.*": ["fr"]}
    plan = plan_blocks(PARAMETERS, 100, granularity_of(config(used_by)))
    shared = "layers.0 (all) + 2 more"
    private = [f"layers.{layer} ({name})" for layer in range(2) for name in ("de", "fr")]
    assert plan.blocks == (shared, *private[:2], *private[2:])
    assert plan.granularity == "refined"
    assert [plan.blocks[block] for block in plan.block_of] == [shared, *private[:2], shared, *private[2:], shared]
    assert plan.left_out == ((), (1, 2), (0, 2), (1, 2), (0, 2))
    other = plan_blocks(PARAMETERS, 100, granularity_of(config(used_by | {"head.weight": ["it"]})))
    assert other.fingerprint() != plan.fingerprint()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"used_by": None}, "used_by = None: expected patterns with their languages"),
        ({"used_by": {}}, 'refined blocks are granularity "model"'),
        ({"used_by": {"head.*": []}}, 'used_by["head.*"] = []: expected a list of languages, at least one'),
        ({"used_by": {"head.*": "de"}}, "used_by[\"head.*\"] = 'de': expected a list"),
        (
            {"used_by": {"head.*": ["dee"]}},
            'used_by["head.*"]: "dee" is not in bucket_moo.languages; did you mean "de"?',
        ),
        ({"used_by": {"tail.*": ["de"]}}, 'used_by["tail.*"]: matches no trained parameter'),
        (
            {"used_by": {"head.*": ["de"], "*.weight": ["fr"]}},
            '"head.*" and "*.weight" both match "head.weight" and name different languages',
        ),
        ({"used_by": {"head.*": ["de"]}, "base": "layers"}, '.base: bucket_moo.granularity = "layers": unknown'),
        ({"used_by": {"head.*": ["de"]}, "base": "refined"}, ".base: "),
        ({"used_by": {"head.*": ["de"]}, "bass": "layer"}, '.bass: unknown, expected one of "base", "used_by"'),
    ],
)
def test_refused(changes: dict[str, Any], said: str) -> None:
    chosen = bm.BucketMOOConfig(languages=LANGUAGES, granularity="refined", granularity_options=changes)
    with pytest.raises(ConfigError) as caught:
        plan_blocks(PARAMETERS, 100, granularity_of(chosen))
    assert str(caught.value).startswith("bucket_moo.granularity_options")
    assert said in str(caught.value)


def test_other_granularities_have_no_options() -> None:
    chosen = bm.BucketMOOConfig(languages=LANGUAGES, granularity="layer", granularity_options={"used_by": {}})
    with pytest.raises(ConfigError, match='granularity_options: granularity "layer" has none'):
        granularity_of(chosen)
    with pytest.raises(ConfigError, match='granularity = "refined": needs granularity_options'):
        plan_blocks(PARAMETERS, 100, "refined")


# --- mode mixed ---------------------------------------------------------------------------------------------------


def test_estimated_weights_of_languages_that_are_left_out_are_zero() -> None:
    """As for a language that is absent; those without an estimate get their even share of those that count."""
    generator = torch.Generator().manual_seed(SEED)
    rows = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    rows[1, 2] = 0.0
    gram, known = rows @ rows.mT, torch.tensor([True, True, False])
    counting = torch.tensor([[True, True, True], [True, True, False]])
    chosen = bm.BucketMOOConfig(languages=LANGUAGES, aggregator="upgrad")

    def weights(counting: Tensor | None, present: Sequence[int]) -> Tensor:
        estimate = GramEstimate(chosen, 2, Exchange(), "reference", torch.device("cpu"), counting)
        return estimate.weights(gram, known, present, torch.Generator())

    everybody, some = weights(None, range(3)), weights(counting, range(3))
    assert torch.equal(some[0], everybody[0])
    assert some[0, 2] == 1 / 3
    assert torch.equal(some[1], weights(None, range(2))[1])
    assert weights(counting, [2]).tolist() == [[0, 0, 1], [0, 0, 0]]


class Private(nn.Module):
    """A matrix for all, and one for each of two languages, which the rows of that language pass."""

    def __init__(self, leak: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.shared = nn.Linear(4, 4, bias=False)
        self.own = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in ("de", "fr")})
        self.leak = leak

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        hidden = self.shared(x)
        passed = [
            self.own[name](hidden) * ((rows == place) + self.leak * (rows == 1 - place)).unsqueeze(-1)
            for place, name in enumerate(self.own)
        ]
        return sum(passed, hidden).square().mean()  # fmt: skip


PRIVATE = {f"own.{name}.*": [name] for name in ("de", "fr")}


@pytest.mark.parametrize("leak", [0.0, 1e-3])
def test_mixed_languages_leave_out_whom_the_patterns_leave_out(leak: float) -> None:
    """And a gradient that there should not be is an error when Grams are taken, as in the first window."""
    rows = torch.arange(6) % 2
    chosen = bm.BucketMOOConfig(
        languages=("de", "fr"), granularity="refined", granularity_options={"used_by": PRIVATE}, aggregator="mean"
    )
    model = Private(leak)
    session = bm.mixed.register(model, chosen)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(SEED))
    model(x, rows, language=rows, target_tokens=torch.tensor([3, 3])).backward()
    if leak:
        with pytest.raises(ConfigError, match=r'language "fr" has a gradient on block "own.de"'):
            optimizer.step()
        return
    optimizer.step()
    assert session.last.weights.tolist() == [[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]
    assert session.last.mask.tolist() == [[True, True], [True, False], [False, True]]


# --- probing ------------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """By language: an adapter that is taken or not, a low-rank one that begins with zeros, a gate that lets nothing
    through, and a parameter that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.shared = nn.Linear(3, 3)
        self.adapters = nn.ModuleDict({name: nn.Linear(3, 3) for name in LANGUAGES})
        self.down = nn.ParameterDict({name: nn.Parameter(torch.randn(2, 3)) for name in LANGUAGES})
        self.up = nn.ParameterDict({name: nn.Parameter(torch.zeros(3, 2)) for name in LANGUAGES})
        self.romance = nn.ParameterDict({"w[0]": nn.Parameter(torch.randn(3))})
        self.spare = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor, name: str) -> Tensor:
        hidden = self.shared(x) + x @ self.down[name].T @ self.up[name].T
        return (self.adapters[name](hidden) + (name != "de") * self.romance["w[0]"]).square().mean()


def test_probing_finds_who_uses_what() -> None:
    model = Branches()
    generator = torch.Generator().manual_seed(SEED)
    batches = {name: [(torch.randn(4, 3, generator=generator), name) for _ in range(2)] for name in LANGUAGES}
    loss: Callable[..., Tensor] = lambda model, batch: model(*batch)  # noqa: E731
    options = bm.probe_dependencies(model, batches, loss)
    alone = {f"{part}.{name}" + ".*" * (part == "adapters"): [name]
             for part, name in itertools.product(("adapters", "down", "up"), LANGUAGES)}  # fmt: skip
    assert options == {"used_by": alone | {"romance.*": ["fr", "it"]}}
    assert all(each.grad is None for each in model.parameters())

    chosen = bm.BucketMOOConfig(
        languages=LANGUAGES, granularity="refined", granularity_options={"base": "parameter", **options}
    )
    session = bm.single.register(model, chosen, micro_steps=3)
    for name in LANGUAGES:
        with session.language(name, target_tokens=1):
            value = model(*batches[name][0])
        (value / 3).backward()
    # The first block is what all or nobody use, and "romance", which shares two languages with it.
    assert session.moo.plan.blocks[0] == "spare + 3 more"
    assert session.last.mask.sum(1).tolist() == [3] + [1] * 12


def test_probing_refuses_what_it_cannot_answer() -> None:
    model = Branches()
    with pytest.raises(ConfigError, match='no batch of "fr"'):
        bm.probe_dependencies(model, {"de": [(torch.ones(1, 3), "de")], "fr": []}, lambda model, batch: model(*batch))
    with pytest.raises(ConfigError, match="no trainable parameter"):
        bm.probe_dependencies(nn.ReLU(), {"de": []})


def test_rules_see_a_mask() -> None:
    """Left out is removed, for `mean` too: the mean of those that use a block."""
    gram = torch.eye(3, dtype=torch.float64).unsqueeze(0)
    mask = torch.tensor([[True, False, True]])
    assert aggregate.weights(gram, "mean", mask).tolist() == [[0.5, 0.0, 0.5]]
