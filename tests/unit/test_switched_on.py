"""A run that draws batches of one language each and averages is told, and no other."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.data import DataLoader

import bucketmoo_ds
from bucketmoo_ds.data import switched_on

LANGUAGES = ["de", "fr"]
ROWS = [{"language": index % 2, "x": torch.full((3,), float(index))} for index in range(32)]


class Owner:
    """Anything that resolves conflicts."""


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch):
    fresh = switched_on._Watch()
    fresh.hooked = switched_on._watch.hooked
    monkeypatch.setattr(switched_on, "_watch", fresh)


@pytest.fixture
def said(caplog):
    caplog.set_level("INFO", "bucketmoo_ds")
    return lambda: [record.message for record in caplog.records if "averages" in record.message]


def sampler(**changes):
    options = {"languages": LANGUAGES, "micro_batch_size": 2, "micro_steps": 2, "world_size": 1}
    return bucketmoo_ds.LanguageBatchSampler(ROWS, **(options | changes))


def step():
    weight = torch.nn.Parameter(torch.ones(3))
    weight.sum().backward()
    torch.optim.SGD([weight]).step()


def test_a_step_without_anybody_is_told_once(said):
    for _ in sampler():
        step()
    (message,) = said()
    assert "SGD steps" in message
    assert "register" in message
    assert "enabled=False" in message


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_may_be_drawn_before_anything_is_registered(said, workers):
    loader = iter(DataLoader(ROWS, batch_sampler=sampler(), num_workers=workers))
    for _ in range(5):
        next(loader)
    owner = Owner()
    switched_on.note(owner)
    step()
    assert not said()


def test_an_owner_counts_while_it_lives(said):
    owner = Owner()
    switched_on.note(owner)
    assert switched_on.any_alive()
    del owner
    assert not switched_on.any_alive()
    next(iter(sampler()))
    step()
    assert len(said()) == 1


def test_a_sampler_that_is_only_looked_at_and_a_step_without_one_are_no_matter(said):
    step()
    assert len(list(sampler())) == 16
    assert not said()


def test_a_session_of_ours_is_an_owner(said):
    model = torch.nn.Linear(3, 1)
    session = bucketmoo_ds.single.register(model, bucketmoo_ds.BucketMOOConfig(languages=LANGUAGES), micro_steps=2)
    optimizer = torch.optim.SGD(model.parameters())
    for batch in itertools.islice(DataLoader(ROWS, batch_sampler=sampler()), 2):
        model(batch["x"], language=batch["language"]).square().mean().backward()
    optimizer.step()
    assert session.moo.windows == 1
    assert not said()


def test_averaging_on_purpose_is_no_matter(said):
    config = bucketmoo_ds.BucketMOOConfig(languages=LANGUAGES, enabled=False)
    next(iter(sampler(config=config)))
    step()
    assert not said()


def test_one_language_has_no_conflict(said):
    next(iter(sampler(languages=["de"], sample_languages=[0] * 32)))
    step()
    assert not said()
