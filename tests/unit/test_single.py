"""One process without a wrapper: K languages in the micro-steps of a window, against the float64 reference."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import math
import os
import random
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.toy import ToyLM, micro_batch, tokens_of
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_module
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import bucketmoo_ds
from bucketmoo_ds import reference
from bucketmoo_ds.adapters.session import Session
from bucketmoo_ds.errors import BucketMOOError, ConfigError, LanguageError
from bucketmoo_ds.plan.choices import create_aggregator

SEED = int(os.environ.get("BUCKETMOO_TEST_SEED") or random.SystemRandom().randrange(1, 10**6))
LANGUAGES = ("de", "fr", "it")


def config(**changes: Any) -> bucketmoo_ds.BucketMOOConfig:
    return bucketmoo_ds.BucketMOOConfig(**{"languages": LANGUAGES} | changes)


def register(model: nn.Module, *, micro_steps: int = 3, bucket_size: int = 700, **changes: Any) -> Session:
    return bucketmoo_ds.single.register(model, config(**changes), micro_steps=micro_steps, bucket_size=bucket_size)


def seeded(seed: int = SEED) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def toy_model(**arguments: Any) -> ToyLM:
    torch.manual_seed(SEED)
    return ToyLM(**arguments)


def window(model: nn.Module, generator: torch.Generator, languages: Iterable[int] = range(3), **extra: Any) -> None:
    for language in languages:
        batch = micro_batch(language, generator, ragged=True) | extra
        (model(**batch, language=LANGUAGES[language]) / 3).backward()


def gradients_of(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: each.grad for name, each in model.named_parameters() if each.requires_grad}


# --- against the reference ----------------------------------------------------------------------------------------

Case = dict[str, Any]

CASES: dict[str, Case] = {
    **{
        f"{storage}-{granularity}": {
            "row_storage": storage,
            "granularity": granularity,
            # The weights of "mean" do not depend on rows that were rounded.
            "aggregator": "mean" if storage == "bfloat16" else aggregator,
        }
        for storage, (granularity, aggregator) in itertools.product(
            ("float32", "bfloat16", "host"),
            (("bucket", "mgda"), ("parameter", "cagrad"), ("layer", "upgrad"), ("model", "mgda")),
        )
    },
    "more_micro_steps": {"micro_steps": 5},
    "streaming": {"micro_steps": 1},
    "token": {"weighting": "token", "micro_steps": 4},
    "tied": {"tied": True},
    "frozen": {"frozen": True},
    "no_target": {"empty": True},
    "one_bucket": {"bucket_size": 10**9},
    "tiny_buckets": {"bucket_size": 1},
    "bf16": {"dtype": torch.bfloat16},
}


def tolerance(case: Case) -> float:
    """The largest error of a combined gradient, relative to the sum of the norms of its weighted rows: as in
    test_reference_parity.py for float32. What is rounded to bf16 moves by 2^-8 of it at most: a row with each
    micro-batch, a bf16 gradient once."""
    if case.get("row_storage") == "bfloat16":
        return 3 * 2.0**-8  # micro-steps
    return 2.0**-8 + 5e-7 if "dtype" in case else 5e-7


@pytest.mark.parametrize("name", CASES)
def test_combined_gradient_is_the_reference(name: str) -> None:
    case = dict(CASES[name])
    micro_steps = case.setdefault("micro_steps", 3)
    dtype, empty = case.pop("dtype", torch.float32), case.pop("empty", False)
    arguments = {key: case.pop(key) for key in ("tied", "frozen") if key in case}
    model = toy_model(**arguments).to(dtype)
    twin = copy.deepcopy(model)
    session = register(model, **case)
    assert session.moo.streaming == (micro_steps == 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = seeded()
    for number in range(2):
        twin.load_state_dict(model.state_dict())
        micros = []
        for step in range(micro_steps):
            language = (number + step) % 3
            batch = micro_batch(language, generator, ragged=True, empty=empty and step == 1)
            twin.zero_grad()
            (twin(**batch) / micro_steps).backward()
            own = {key: each.grad.double() for key, each in twin.named_parameters() if each.requires_grad}
            micros.append(reference.MicroGradient(language, tokens_of(batch), own))
            (model(**batch, language=LANGUAGES[language]) / micro_steps).backward()
        compare(session, model, micros, micro_steps, CASES[name])
        optimizer.step()
        optimizer.zero_grad()


def compare(
    session: Session, model: nn.Module, micros: list[reference.MicroGradient], micro_steps: int, case: Case
) -> None:
    plan = session.moo.plan
    blocks = {
        block: [each.name for each, of in zip(plan.parameters, plan.block_of, strict=True) if of == number]
        for number, block in enumerate(plan.blocks)
    }
    expected, weights = reference.resolve_window(
        micros,
        blocks,
        micro_steps=micro_steps,
        aggregator=create_aggregator(session.moo.config),
        weighting=session.moo.config.weighting,
    )
    assert session.last is not None
    found = gradients_of(model)
    for number, (block, names) in enumerate(blocks.items()):
        difference = torch.cat([(found[name].double() - expected[name]).flatten() for name in names])
        diagonal = session.last.gram[number].diagonal()[list(session.last.present)]
        scale = float((weights[block].abs() * diagonal.sqrt()).sum())
        assert float(difference.norm()) <= tolerance(case) * scale, f"{block}, BUCKETMOO_TEST_SEED={SEED}"


# --- what a window does to .grad ----------------------------------------------------------------------------------


def test_gradients_are_freed_until_the_boundary() -> None:
    model = toy_model()
    session = register(model, micro_steps=3)
    generator = seeded()
    for language in (0, 1):
        window(model, generator, [language])
        assert all(gradient is None for gradient in gradients_of(model).values())
    window(model, generator, [2])
    assert all(gradient is not None for gradient in gradients_of(model).values())
    assert session.last is not None
    assert session.last.present == (0, 1, 2)


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "host"])
def test_rows_take_what_the_formula_says(storage: str) -> None:
    """K P r, and the padding of each bucket: less than `exchange.ALIGNMENT` elements a row."""
    model = toy_model()
    session = register(model, row_storage=storage)
    window(model, seeded())
    elements, size = sum(each.numel() for each in model.parameters()), 2 if storage == "bfloat16" else 4
    padding = 3 * 8 * len(session.moo.plan.buckets) * size
    assert 0 <= session.moo.row_bytes - 3 * elements * size < padding


@pytest.mark.parametrize(("storage", "size"), [(None, 0), ("float32", 4), ("bfloat16", 2), ("host", 4)])
def test_peak_memory_is_what_the_formula_says(storage: str | None, size: int) -> None:
    """K P r + P b above what was there before the first window, counted in the events of torch's CPU allocator; plain
    training takes P b.

    Layers are many and the batch is small, so that the gradient of one layer, while it is added to another, and the
    activations are little: below 10 % of P b. With `host` the rows are on the host, which on a CPU is the same memory.
    """
    torch.manual_seed(SEED)
    model = nn.Sequential(*[nn.Linear(96, 96) for _ in range(24)])
    elements = sum(each.numel() for each in model.parameters())
    session = register(model, bucket_size=40_000, row_storage=storage) if storage else None
    inputs = torch.randn(2, 96)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        for language in range(3):
            with session.language(language) if session else contextlib.nullcontext():
                (model(inputs).square().mean() / 3).backward()
    formula = (3 * size + 4) * elements
    assert formula <= peak_bytes(recorded) <= formula + 0.1 * 4 * elements


def peak_bytes(recorded: profile) -> int:
    events = [each for each in recorded.profiler.kineto_results.events() if each.name() == "[memory]"]
    return max(itertools.accumulate(each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())))


def test_parameters_that_nothing_used_have_no_gradient() -> None:
    """Adapter 0 is used in one micro-step, adapter 1 in none."""
    model = toy_model(adapters=2)
    register(model)
    generator = seeded()
    window(model, generator, [0], adapter=0)
    window(model, generator, [1, 2])
    for name, gradient in gradients_of(model).items():
        assert (gradient is None) == name.startswith("adapters.1."), name


@pytest.mark.parametrize("how", ["zeros", "never"])
def test_how_gradients_are_reset_makes_no_difference(how: str) -> None:
    models = [toy_model(), toy_model()]
    for model, reset in zip(models, ("none", how), strict=True):
        register(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        generator = seeded()
        for _ in range(3):
            window(model, generator)
            optimizer.step()
            if reset != "never":
                optimizer.zero_grad(set_to_none=reset == "none")
    assert all(torch.equal(*pair) for pair in zip(*(model.parameters() for model in models), strict=True))


class Recomputed(nn.Module):
    """One layer in two checkpoints: if they are reentrant, its gradient comes twice in a backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.first, self.shared, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, inputs: Tensor, reentrant: bool) -> Tensor:
        hidden = self.first(inputs)
        for _ in range(2):
            hidden = checkpoint(lambda value: self.shared(value).tanh(), hidden, use_reentrant=reentrant)
        return self.last(hidden).square().mean()


def recomputed(reentrant: bool, bucket_size: int) -> dict[str, Tensor | None]:
    model = Recomputed()
    register(model, micro_steps=2, bucket_size=bucket_size)
    for language in (0, 1):
        inputs = torch.randn(6, 4, generator=seeded(language))
        (model(inputs, reentrant=reentrant, language=language) / 2).backward()
    return gradients_of(model)


def test_second_gradient_is_added_while_its_bucket_is_here() -> None:
    plain, reentrant = (recomputed(each, bucket_size=10**9) for each in (False, True))
    assert all(torch.equal(plain[name], reentrant[name]) for name in plain)


def test_second_gradient_after_its_bucket_was_resolved_is_an_error() -> None:
    with pytest.raises(BucketMOOError, match=r'"shared.*second gradient.*use_reentrant=False'):
        recomputed(reentrant=True, bucket_size=1)


def test_closed_session_leaves_the_model_as_it_was() -> None:
    model, plain = toy_model(), toy_model()
    register(model).close()
    batch = micro_batch(0, seeded())
    for each in (model, plain):
        each(**batch).backward()
    found, expected = gradients_of(model), gradients_of(plain)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("trained", [False, True])
def test_session_and_model_go_together(trained: bool) -> None:
    model = toy_model()
    session = register(model)
    if trained:
        window(model, seeded())
    gone = [weakref.ref(each) for each in (model, session, session.moo, model.head.weight)]
    del model, session
    gc.collect()
    assert [each() for each in gone] == [None] * 4


# --- faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_nonfinite", ["drop", "keep"])
def test_window_that_is_not_finite(on_nonfinite: str) -> None:
    model = toy_model()
    session = bucketmoo_ds.single.register(
        model, config(), micro_steps=3, bucket_size=700, on_nonfinite=on_nonfinite
    )
    optimizer = torch.optim.Adam(model.parameters())
    generator = seeded()
    before = copy.deepcopy(model.state_dict())
    for language in range(3):
        loss = model(**micro_batch(language, generator), language=language) / 3
        (loss * math.nan if language == 1 else loss).backward()
    assert session.skipped
    assert session.last is not None
    assert {language for language, _ in session.last.nonfinite} == {"fr"}
    if on_nonfinite == "drop":
        optimizer.step()
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    else:
        assert all(bool(gradient.isnan().all()) for gradient in gradients_of(model).values())
    optimizer.zero_grad()
    window(model, generator)
    assert not session.skipped
    assert all(bool(gradient.isfinite().all()) for gradient in gradients_of(model).values())
    assert session.moo.counters == {"windows": 2, "skipped_windows": 1, "nonfinite.fr": 1}


def test_step_within_a_window() -> None:
    model = toy_model()
    register(model)
    window(model, seeded(), [0])
    with pytest.raises(BucketMOOError, match="after 1 of 3 micro-steps"):
        torch.optim.SGD(model.parameters(), lr=0.05).step()


def test_backward_after_the_boundary() -> None:
    model = toy_model()
    register(model)
    window(model, seeded())
    with pytest.raises(BucketMOOError, match=r"call optimizer\.step\(\)"):
        window(model, seeded(), [0])


@pytest.mark.parametrize(
    "part", [lambda model, ids: model.embed.weight, lambda model, ids: model.layers[0](model.embed(ids))]
)
def test_gradient_that_comes_without_the_model(part: Any) -> None:
    model = toy_model()
    session = register(model)
    window(model, seeded())
    model.zero_grad()
    with session.language("de"), pytest.raises(LanguageError, match="a backward without a forward pass of the model"):
        part(model, torch.arange(5)).square().sum().backward()


def replace(model: ToyLM) -> None:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def unfreeze(model: ToyLM) -> None:
    model.requires_grad_(True)


def add(model: ToyLM) -> None:
    model.head = nn.Linear(13, 23, bias=False)


@pytest.mark.parametrize(("change", "parameter"), [(replace, "embed"), (unfreeze, "layers.1.0"), (add, "head")])
def test_parameters_that_were_not_there_at_register(change: Any, parameter: str) -> None:
    model = toy_model(frozen=True)
    register(model)
    change(model)
    with pytest.raises(BucketMOOError, match=f'"{parameter}.weight" .* took another way'):
        window(model, seeded(), [0])
    with pytest.raises(BucketMOOError, match=r"no window has resolved|did not come to its end"):
        torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.05).step()


# --- refused at start-up ------------------------------------------------------------------------------------------


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def hooked() -> nn.Module:
    model = toy_model()
    model.head.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    return model


def registered() -> nn.Module:
    model = toy_model()
    register(model)
    return model


def sparse() -> nn.Module:
    model = toy_model()
    model.embed = nn.Embedding(23, 13, sparse=True)
    return model


def spread() -> nn.Module:
    model = toy_model()
    model.head.to("meta")
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (hooked, '"head.weight" has an optimizer in backward'),
        (registered, '"embed.weight" has an optimizer in backward'),
        (sparse, '"embed" has sparse = True'),
        (spread, r"several devices \(cpu, meta\)"),
        (lambda: toy_model().requires_grad_(False), "no trainable parameter"),
    ],
)
def test_refused_models(make: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"^single\.register: .*{said}"):
        register(make())


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (DistributedDataParallel, "DistributedDataParallel"),
        (lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")), "FullyShardedDataParallel"),
        (lambda model: fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,))), "FSDPToyLM"),
    ],
)
def test_refused_wrappers(one_rank: None, wrap: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"^single\.register: the model is wrapped \({said}\)"):
        register(wrap(toy_model()))


def test_refused_shards(one_rank: None) -> None:
    model = distribute_module(toy_model(), dist.init_device_mesh("cpu", (1,)))
    with pytest.raises(ConfigError, match=r'^single\.register: parameter "embed.weight" is sharded'):
        register(model)


def test_one_rank_in_a_process_group_is_one_process(one_rank: None) -> None:
    model = toy_model()
    session = register(model)
    window(model, seeded())
    assert session.last is not None


def test_refused_bucket_size() -> None:
    with pytest.raises(ConfigError, match=r"single\.register: bucket_size = 0: expected at least 1"):
        register(toy_model(), bucket_size=0)


def test_default_buckets_are_as_large_as_ddps() -> None:
    model = nn.Linear(2**10, 26 * 2**8, bias=False, device="meta", dtype=torch.bfloat16)
    model = nn.Sequential(model, nn.Linear(2**10, 25 * 2**9, bias=False, device="meta", dtype=torch.bfloat16))
    session = bucketmoo_ds.single.register(model, config(), micro_steps=1)
    assert [bucket.numel * 2 for bucket in session.moo.plan.buckets] == [25 * 2**20, 13 * 2**20]
