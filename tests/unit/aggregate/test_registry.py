"""Finding aggregators by name, their options, and what `weights` says to bad input."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import Tensor

from bucketmoo_ds.aggregate import Aggregator, create, names, register, weights
from bucketmoo_ds.aggregate import base as registry
from bucketmoo_ds.errors import ConfigError


@pytest.fixture
def _clean_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.mark.usefixtures("_clean_registry")
def test_a_new_aggregator_works_by_its_name() -> None:
    @register("loudest")
    @dataclasses.dataclass(frozen=True)
    class Loudest(Aggregator):
        share: float = 1.0

        def weights(self, gram: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
            norms = gram.diagonal(dim1=-2, dim2=-1) * mask
            return self.share * (norms == norms.amax(-1, keepdim=True)).to(torch.float64)

    gram = torch.diag_embed(torch.tensor([[1.0, 3.0, 2.0], [5.0, 3.0, 9.0]]))
    expected = torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.0, 0.5]], dtype=torch.float64)
    assert torch.equal(weights(gram, "loudest", share=0.5), expected)
    assert "loudest" in names()
    with pytest.raises(ValueError, match="already belongs to"):
        register("mgda")(Loudest)


def test_only_aggregators_can_be_registered() -> None:
    with pytest.raises(ValueError, match="expected a frozen dataclass derived from Aggregator"):
        register("nothing")(int)  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mdga", {}, 'aggregator = "mdga": unknown, expected one of .*; did you mean "mgda"?'),
        ("mean", {"c": 0.5}, 'aggregator "mean": unknown option "c", it has no options'),
        ("mgda", {"c": 0.5}, 'aggregator "mgda": unknown option "c", expected one of "max_weight"'),
        ("mgda", {"max_weight": 0.0}, 'aggregator "mgda": max_weight = 0.0: expected a number above 0 and at most 1'),
        ("mgda", {"max_weight": 1.5}, "max_weight = 1.5: expected a number"),
        ("mgda", {"max_weight": True}, "max_weight = True: expected a number"),
        ("mgda", {"max_weight": "1"}, "max_weight = '1': expected a number"),
        ("mgda", {"max_weight": float("nan")}, "max_weight = nan: expected a number"),
        ("cagrad", {"norm_ep": 0.5}, 'unknown option "norm_ep", expected one of .*; did you mean "norm_eps"?'),
        ("cagrad", {"c": 1.0}, 'aggregator "cagrad": c = 1.0: expected a number from 0.0 to below 1.0'),
        ("cagrad", {"c": "0.5"}, "c = '0.5': expected a number"),
        ("cagrad", {"c": True}, "c = True: expected a number"),
        ("cagrad", {"c": float("nan")}, "c = nan: expected a number"),
        ("cagrad", {"clip_to_preference": 1}, 'aggregator "cagrad": clip_to_preference = 1: expected true or false'),
        ("cagrad", {"norm_eps": -1e-4}, "norm_eps = -0.0001: expected a number"),
    ],
)
def test_a_wrong_name_or_option_is_named(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", re.escape("?"))):
        create(name, **options)


@pytest.mark.parametrize(
    ("gram", "arguments", "message"),
    [
        (torch.eye(3)[:2], {}, r"gram: shape \[2, 3\]: expected \[B, K, K\]"),
        (torch.ones(2, 2, dtype=torch.int64), {}, "gram: dtype torch.int64: expected"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), {}, "gram: not symmetric"),
        (torch.tensor([[1.0, 0.0], [0.0, -1.0]]), {}, "gram: a negative diagonal entry"),
        (torch.eye(2), {"mask": torch.ones(2)}, r"mask: torch.float32 of shape \[2\]: expected torch.bool"),
        (torch.eye(2), {"mask": torch.ones(3, dtype=torch.bool)}, r"\[3\]: expected torch.bool of shape \[2\]"),
        ([[1.0], [0.0, 1.0]], {}, "gram: .*expected a tensor, or nested lists of equal length"),
        ("gram", {}, "gram: .*expected a tensor, or nested lists"),
        (None, {}, "gram: .*expected a tensor, or nested lists"),
        ([1.0, 2.0], {}, r"gram: shape \[2\]: expected \[B, K, K\]"),
        (torch.eye(2), {"mask": [[True], [True, False]]}, "mask: .*expected a tensor, or nested lists of equal length"),
        (torch.eye(2), {"normalize": "loss_l"}, 'normalize = "loss_l": unknown.*did you mean "loss_l2"'),
        (torch.eye(2), {"normalize": "loss"}, 'losses: missing; normalize = "loss" needs a number for each language'),
        (torch.eye(2), {"normalize": "loss", "losses": [1.0]}, r"losses: shape \[1\]: expected 2 numbers"),
        (torch.eye(2), {"preference": [1.0, 2.0, 3.0]}, r"preference: shape \[3\]: expected 2 numbers"),
        (torch.eye(2), {"preference": [1.0, 0.0]}, "preference = .*expected positive numbers; mask a row"),
        (torch.eye(2), {"preference": [1.0, float("inf")]}, "preference = .*expected positive numbers"),
        (torch.eye(2), {"rescale": "max"}, 'rescale = "max": unknown, expected one of "none", "mean"'),
    ],
)
def test_bad_input_is_refused(gram: Tensor, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weights(gram, "mgda", **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [None, 3, ["mgda"]])
def test_what_is_no_name_is_refused_with_the_names(name: object) -> None:
    message = rf"aggregator = {re.escape(repr(name))}: expected a name, one of .*\"mgda\""
    with pytest.raises(ConfigError, match=message):
        weights(torch.eye(2), name)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        create(name)  # type: ignore[arg-type]


def test_nested_lists_are_a_gram() -> None:
    rows = torch.randn(3, 4, 6, dtype=torch.float64)
    gram, mask = rows @ rows.mT, torch.tensor([[True, True, False, True]] * 3)
    given = weights(gram.tolist(), "mgda", mask.tolist())  # type: ignore[arg-type]
    assert torch.equal(given, weights(gram, "mgda", mask))
    assert torch.equal(weights(gram[0].tolist(), "mean"), torch.full((4,), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_comes_in_and_float64_goes_out(dtype: torch.dtype) -> None:
    rows = torch.randn(3, 4, 6, dtype=torch.float64)
    gram = (rows @ rows.mT).to(dtype)
    result = weights(gram, "mgda")
    assert (result.dtype, result.shape) == (torch.float64, (3, 4))
    assert weights(gram[0], "mgda").shape == (4,)
    # One block alone takes the same path as in a batch; a Gram in 8 bits of mantissa is lifted to be semidefinite.
    torch.testing.assert_close(weights(gram[0], "mgda"), result[0], rtol=0, atol=1e-6)
