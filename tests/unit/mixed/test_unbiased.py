"""Grams are unbiased where the true gradients are known: linear regression on moments that are given."""

from __future__ import annotations

import torch
from draw import SEED
from torch import Tensor, nn
from torch.nn import functional

import bucketmoo_ds as bm

LANGUAGES, WIDTH, DRAWS = ("de", "fr"), 4, 200


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 1, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return functional.mse_loss(self.linear(x), y)


def test_grams_are_unbiased_and_naive_ones_are_not() -> None:
    """The features of language l are `shift_l + noise`, unit variance, and `y = x . theta_l + noise`: so its gradient
    is expected to be `2 (I + shift_l shift_l') (weight - theta_l)`."""
    generator = torch.Generator().manual_seed(SEED)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    shift, theta = 0.5 * normal(2, WIDTH), normal(2, WIDTH)
    model = Regression().double()
    moments = torch.eye(WIDTH, dtype=torch.float64) + shift.unsqueeze(2) * shift.unsqueeze(1)
    truth = 2 * torch.einsum("lij,lj->li", moments, model.linear.weight.detach()[0] - theta)
    config = bm.BucketMOOConfig(
        languages=LANGUAGES, aggregator="mean", granularity="model", gram_every=1, smoothing=0.0, shift_labels=False
    )
    session = bm.mixed.register(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    found, naive = [], []
    for _ in range(DRAWS):
        sizes = 2 + torch.randint(4, (2,), generator=generator)
        language = torch.arange(2).repeat_interleave(sizes)[torch.randperm(int(sizes.sum()), generator=generator)]
        x = shift[language] + normal(len(language), WIDTH)
        y = (x * theta[language]).sum(1, keepdim=True) + 3 * normal(len(language), 1)
        model(x, y, language=language).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(session.estimate._kept[0] / session.estimate._kept[-1])
        naive.append(session.estimate._kept_noisy[0] / session.estimate._kept_noisy[-1])

    def off_by(grams: list[Tensor]) -> Tensor:
        each = torch.stack(grams)
        return (each.mean(0) - truth @ truth.mT).abs() / (each.std(0) / DRAWS**0.5)

    # 4 standard errors, three entries: a right Gram fails once in 5000 runs.
    assert (off_by(found) < 4).all(), off_by(found)
    assert (off_by(naive).diagonal() > 4).all(), off_by(naive)
