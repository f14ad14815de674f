"""A rule is asked for weights when what they follow from has changed, and a resumed run gets the same."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import Tensor, nn

import bucketmoo_ds as bm
from bucketmoo_ds import aggregate
from bucketmoo_ds.adapters.mixed.session import MixedSession
from bucketmoo_ds.aggregate import base as registry

SEED = random.SystemRandom().randrange(2**32)
LANGUAGES, EVERY = ("de", "fr", "ko"), 3
asked: list[Tensor] = []


@dataclasses.dataclass(frozen=True)
class Counted(aggregate.Aggregator):
    """Weights that are drawn, as PCGrad's are."""

    def weights(self, gram: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """See `Aggregator.weights`."""
        asked.append(gram)
        return torch.rand(mask.shape, generator=generator, dtype=torch.float64) * mask


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).square().mean()


def test_the_rule_is_asked_once_a_gram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._REGISTRY, "counted", Counted)
    print(f"seed {SEED}")
    generator = torch.Generator().manual_seed(SEED)
    config = bm.BucketMOOConfig(
        languages=LANGUAGES, aggregator="counted", gram_every=EVERY, granularity="model", weight_smoothing=0.5
    )

    def window(session: MixedSession, model: nn.Module, x: Tensor) -> tuple[Tensor, int, bool]:
        before = len(asked)
        model(x, language=torch.arange(6) % 3, target_tokens=torch.tensor([2, 2, 2])).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        model.zero_grad()
        assert session.last is not None
        return session.last.weights, len(asked) - before, session.last.fresh

    def made() -> tuple[Model, MixedSession]:
        torch.manual_seed(SEED)
        model = Model().double()
        return model, bm.mixed.register(model, config)

    batches = torch.randn(8, 6, 4, generator=generator, dtype=torch.float64)
    model, session = made()
    found, state = [], {}
    for number, x in enumerate(batches):
        if number == 5:
            state = {"model": {name: each.clone() for name, each in model.state_dict().items()}, **session.state_dict()}
        found.append(window(session, model, x))
    weights, counts, fresh = zip(*found, strict=True)
    assert counts == (1, 1, 0, 0, 1, 0, 0, 1)  # Grams are taken in windows 0, 3 and 6
    assert [number for number, each in enumerate(fresh) if each] == [1, 4, 7]
    assert weights[1].equal(weights[3]) and not weights[3].equal(weights[4])

    resumed, again = made()
    resumed.load_state_dict(state.pop("model"))
    again.load_state_dict(state)
    for place, x in enumerate(batches[5:]):
        weights_again, _, fresh_again = window(again, resumed, x)
        assert weights_again.equal(weights[5 + place])  # averaged over windows as well, from the same on
        assert fresh_again == fresh[5 + place]
