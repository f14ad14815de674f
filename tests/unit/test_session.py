"""The session of torch-native adapters, on one rank with the plainest of adapters: which backward belongs to which
language and window, whatever a model returns, and what is refused."""

from __future__ import annotations

import collections
import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Variable
from transformers.modeling_outputs import CausalLMOutput
from unit.simulated_ranks import run_ranks

from bucketmoo_ds.adapters.hooks import BeforeAccumulation, after_backward, weak
from bucketmoo_ds.adapters.session import Adapter, Session
from bucketmoo_ds.comm.exchange import Exchange
from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.errors import BucketMOOError, ConfigError, DisagreementError, LanguageError
from bucketmoo_ds.pipeline.engine import BucketMOO
from bucketmoo_ds.plan.blocks import Parameter, plan_blocks

LANGUAGES = ("de", "fr")
WIDTH, CLASSES = 5, 3


@dataclasses.dataclass
class Outputs:
    loss: Tensor
    logits: Tensor


@dataclasses.dataclass(frozen=True)
class Frozen:
    logits: Tensor
    name: str = "not a tensor"
    inside: Any = None
    derived: int = dataclasses.field(default=7, init=False)


Pair = collections.namedtuple("Pair", "loss logits")

# What a model returns, and the loss that its user makes of it; twice the mean in all of them.
KINDS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda loss, logits: loss, lambda out: 2 * out),
    "tuple": (lambda loss, logits: (loss, logits), lambda out: 2 * out[0]),
    "named tuple": (Pair, lambda out: 2 * out.loss),
    "dict": (lambda loss, logits: {"loss": loss, "logits": logits}, lambda out: 2 * out["loss"]),
    "nested": (lambda loss, logits: [None, {"a": (3, loss)}], lambda out: 2 * out[1]["a"][1]),
    "dataclass": (Outputs, lambda out: 2 * out.loss),
    "frozen dataclass": (lambda loss, logits: Frozen(logits, inside=[loss]), lambda out: 2 * out.inside[0]),
    "transformers": (lambda loss, logits: CausalLMOutput(loss=loss, logits=logits), lambda out: 2 * out.loss),
    "logits": (lambda loss, logits: logits, lambda out: 2 * out.square().mean()),
    "both": (
        lambda loss, logits: {"loss": loss, "logits": logits},
        lambda out: out["loss"] + out["logits"].square().mean(),
    ),
}


class Model(nn.Module):
    """Its loss is the mean square of its logits, times what its parameters are scaled by."""

    def __init__(self, kind: str = "tensor") -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, CLASSES)
        self.make = KINDS[kind][0]

    def forward(self, inputs: Tensor) -> Any:
        logits = self.layer(inputs)
        return self.make(logits.square().mean(), logits)


class Plain(Adapter):
    """Takes gradients from the parameters themselves, into one bucket."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = list(model.parameters())
        self.closed = self.abandoned = self.began = False
        self.before = BeforeAccumulation(self.parameters, self.note)
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(weak(self.come))

    def begin(self) -> None:
        self.began = True
        if not self.moo.window.once_a_window or self.micro.first:
            self.sums = [torch.zeros_like(each) for each in self.parameters]
        if self.micro.first:
            for parameter in self.parameters:
                parameter.grad = None

    def note(self, gradient: Tensor) -> None:
        if not self.closed:
            self.arrive()

    def come(self, parameter: Tensor) -> None:
        if self.closed:
            return
        index = next(index for index, each in enumerate(self.parameters) if each is parameter)
        if self.micro.factor:
            self.sums[index] += self.micro.factor * parameter.grad
        parameter.grad = None

    def end(self) -> list[bool]:
        if self.micro.exchanges:
            self.moo.ingest(0, torch.cat([each.flatten() for each in self.sums]))
        return [True] * len(self.parameters)

    def sink(self, bucket: int, shard: Tensor) -> None:
        self.combined = shard.split([parameter.numel() for parameter in self.parameters])

    def write(self) -> None:
        for index, parameter in enumerate(self.parameters):
            parameter.grad = torch.zeros_like(parameter)
            if not self.micro.skipped:
                parameter.grad.copy_(self.combined[index].view_as(parameter))

    def abandon(self) -> None:
        self.abandoned = True

    def close(self) -> None:
        self.closed = True


def config(**changes: Any) -> BucketMOOConfig:
    return BucketMOOConfig(**{"languages": LANGUAGES, "aggregator": "mean"} | changes)


def session_of(
    model: nn.Module,
    *,
    micro_steps: Any = 1,
    once_a_window: bool = False,
    on_nonfinite: str = "drop",
    adapter: Plain | None = None,
    **changes: Any,
) -> Session:
    adapter = adapter or Plain(model)
    chosen = config(**changes)
    steps = micro_steps if callable(micro_steps) else lambda: micro_steps
    sizes = [Parameter(name, parameter.numel()) for name, parameter in model.named_parameters()]
    plan = plan_blocks(sizes, 10**9, "bucket")
    adapter.moo = BucketMOO(chosen, plan, Exchange(), adapter.sink, micro_steps=steps, once_a_window=once_a_window)
    return Session(model, chosen, adapter, on_nonfinite)


def gradient(model: Model) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("once_a_window", [False, True], ids=["every", "once"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_mean_over_tokens_whatever_the_model_returns(kind: str, once_a_window: bool) -> None:
    """Of several micro-batches of one language, with unequal numbers of tokens. With `once_a_window` the rank adds them
    up, each times a factor."""
    model, tokens = Model(kind), [7, 0, 2, 30]
    session = session_of(model, micro_steps=len(tokens), once_a_window=once_a_window)
    batches = [torch.randn(4, WIDTH) for _ in tokens]
    expected = torch.zeros(WIDTH * CLASSES + CLASSES, dtype=torch.float64)
    for inputs, count in zip(batches, tokens, strict=True):
        loss = 2 * model.layer(inputs).square().mean()
        found = torch.autograd.grad(loss, list(model.parameters()))
        expected += count / sum(tokens) * torch.cat([each.flatten() for each in found]).double()
    for inputs, count in zip(batches, tokens, strict=True):
        output = model(inputs, language="fr", target_tokens=count)
        (KINDS[kind][1](output) / len(tokens)).backward()
    # A handful of float32 roundings.
    torch.testing.assert_close(gradient(model).double(), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert session.last.target_tokens == (0, sum(tokens))


@pytest.mark.parametrize("once_a_window", [False, True], ids=["every", "once"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_returns_its_own_objects(kind: str, once_a_window: bool) -> None:
    """Nothing is copied or wrapped, so that whatever can be done to it can still be done, in place too."""
    model = Model(kind)
    session_of(model, micro_steps=2, once_a_window=once_a_window)
    made: list[Any] = []
    make = model.make
    model.make = lambda loss, logits: made.append(make(loss, logits)) or made[-1]
    inputs = torch.randn(4, WIDTH)
    assert model(inputs, language="de") is made[0]


@pytest.mark.parametrize("once_a_window", [False, True], ids=["every", "once"])
@pytest.mark.parametrize("change", [lambda out: out.div_(2), lambda out: out.mul_(0.5), lambda out: out.sub_(out / 2)])
def test_outputs_that_are_changed_in_place(change: Callable[[Tensor], Tensor], once_a_window: bool) -> None:
    model = Model("tensor")
    session = session_of(model, micro_steps=2, once_a_window=once_a_window)
    batches, losses = torch.randn(2, 4, WIDTH), []
    for inputs in batches:
        loss = change(model(inputs, language="de"))
        loss.backward()
        losses.append(model.layer(inputs).square().mean() / 2)
    found = torch.autograd.grad(sum(losses), list(model.parameters()))
    torch.testing.assert_close(gradient(model), torch.cat([each.flatten() for each in found]))
    assert session.moo.windows == 1


class Hiding(nn.Module):
    """Returns what nobody looks into."""

    class Box:
        __slots__ = ("inside",)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, CLASSES)

    def forward(self, inputs: Tensor) -> Any:
        box = self.Box()
        box.inside = self.layer(inputs).square().mean()
        return box


def test_outputs_that_hide_their_tensors() -> None:
    model = Hiding()
    session = session_of(model, micro_steps=2)
    for language in LANGUAGES:
        model(torch.randn(4, WIDTH), language=language).inside.backward()
    assert session.last.present == (0, 1)
    assert gradient(model).any()


def test_no_token_and_a_loss_of_nothing_over_nothing() -> None:
    """The gradient of 0/0 times a factor of 0 would be NaN, in the sum of all micro-steps."""
    model = Model("logits")
    session = session_of(model, micro_steps=2, once_a_window=True)
    for tokens in (0, 3):
        logits = model(torch.randn(4, WIDTH), language="de", target_tokens=tokens)
        (logits.sum() * tokens / torch.tensor(float(tokens))).backward()
    assert not session.skipped
    assert gradient(model).isfinite().all()
    assert gradient(model).abs().sum() > 0


def test_gradients_are_not_recorded_while_evaluating() -> None:
    model = Model()
    session = session_of(model)
    with torch.no_grad():
        model(torch.randn(4, WIDTH), language="fr")
    model(torch.randn(4, WIDTH), language="de").backward()
    assert session.last.present == (0,)


def test_language_of_a_with_block() -> None:
    model = Model()
    session = session_of(model)
    with session.language("fr", target_tokens=5):
        output = model(torch.randn(4, WIDTH))
    output.backward()
    assert session.last.target_tokens == (0, 5)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({}, "names no language"),
        ({"language": "es"}, '"es" is not in'),
        ({"language": ["de", "fr"]}, "several languages"),
    ],
)
def test_language_errors_come_out_of_backward(entries: dict[str, Any], said: str) -> None:
    model = Model()
    session = session_of(model)
    with pytest.raises(LanguageError, match=said):
        model(torch.randn(4, WIDTH), **entries).backward()
    assert not session.moo.in_window
    assert not session._adapter.began


def test_a_language_that_changes_where_gradients_are_added_up() -> None:
    model = Model()
    session_of(model, micro_steps=2, once_a_window=True)
    model(torch.randn(4, WIDTH), language="de").backward()
    with pytest.raises(LanguageError, match=r'from language "de" to "fr" within a window.*keep one language'):
        model(torch.randn(4, WIDTH), language="fr").backward()


# --- windows ------------------------------------------------------------------------------------------------------


def backward(model: Model, language: str = "de", times: float = 1.0) -> None:
    (times * model(torch.randn(4, WIDTH), language=language)).backward()


def test_a_step_within_a_window_is_refused() -> None:
    model, other = Model(), Model()
    session_of(model, micro_steps=2)
    optimizer, others = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, other))
    backward(model)
    with pytest.raises(BucketMOOError, match="after 1 of 2 micro-steps"):
        optimizer.step()
    others.step()
    backward(model)
    optimizer.step()


def test_backward_after_the_boundary_is_refused() -> None:
    model = Model()
    session = session_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model)
    with pytest.raises(BucketMOOError, match=r"call optimizer.step\(\) and optimizer.zero_grad\(\)"):
        backward(model)
    with pytest.raises(BucketMOOError, match="did not come to its end"):
        optimizer.step()  # one parameter has had the other gradient added by now
    session.abandon()
    backward(model)
    optimizer.step()


def test_a_window_whose_step_is_left_out() -> None:
    model = Model()
    session = session_of(model)
    backward(model)
    model.zero_grad()
    backward(model)
    assert session.moo.counters["windows"] == 2


def test_state_goes_round_between_windows_only() -> None:
    model = Model()
    session = session_of(model, micro_steps=2)
    for _ in range(2):
        backward(model)
    state = session.state_dict()
    assert state["windows"] == 1
    model.zero_grad()
    backward(model)
    with pytest.raises(BucketMOOError, match="in the middle of a window"):
        session.state_dict()
    resumed = session_of(Model(), micro_steps=2)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    larger = nn.Linear(WIDTH, CLASSES + 1)
    with pytest.raises(ConfigError, match="blocks are not this run's"):
        session_of(larger).load_state_dict(state)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_dropped(bad: float) -> None:
    model = Model()
    session = session_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    before = [each.clone() for each in (*model.parameters(), *optimizer.state[model.layer.weight].values())]
    backward(model, times=bad)
    assert session.skipped
    assert all(parameter.grad is None for parameter in model.parameters())
    optimizer.step()
    after = [*model.parameters(), *optimizer.state[model.layer.weight].values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    backward(model)
    assert not session.skipped
    assert session.moo.counters == {"windows": 3, "skipped_windows": 1, "nonfinite.de": 1}


def test_rows_that_are_not_finite_are_kept_for_a_grad_scaler() -> None:
    model = Model()
    session = session_of(model, on_nonfinite="keep")
    backward(model, times=float("inf"))
    assert session.skipped
    assert gradient(model).isnan().all()


# --- start and end ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"on_nonfinite": "dropp"}, r"on_nonfinite = 'dropp': expected \"drop\" or \"keep\""),
        ({"micro_steps": 0}, "micro_steps = 0: expected a whole number, 1 or more"),
        ({"micro_steps": True}, "micro_steps = True"),
        ({"micro_steps": 1.5}, "micro_steps = 1.5"),
        ({"enabled": False}, "bucket_moo.enabled = false"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        session_of(Model(), **arguments)


@pytest.mark.parametrize(
    "changes",
    [
        {"languages": ("fr", "de")},
        {"seed": 1},
        {"micro_steps": 3},
        {"once_a_window": True},
        {"numel": 13},
        {"name": "b"},
    ],
    ids=str,
)
def test_ranks_that_differ_are_told_at_the_start(changes: dict[str, Any]) -> None:
    def body(exchange: Any) -> None:
        mine = changes if exchange.rank == 1 else {}
        chosen = config(**{name: mine[name] for name in ("languages", "seed") if name in mine})
        plan = plan_blocks([Parameter(mine.get("name", "a"), mine.get("numel", 12))], 100, "bucket")
        steps, once_a_window = mine.get("micro_steps", 2), mine.get("once_a_window", False)
        BucketMOO(chosen, plan, exchange, print, micro_steps=lambda: steps, once_a_window=once_a_window).check_ranks()

    for error in run_ranks(3, body):
        assert isinstance(error, DisagreementError)
        assert "run one script on all" in str(error)


def test_ranks_that_agree_start() -> None:
    plan = plan_blocks([Parameter("a", 12)], 100, "bucket")

    def body(exchange: Any) -> None:
        BucketMOO(config(), plan, exchange, print, micro_steps=lambda: 1, once_a_window=False).check_ranks()

    assert run_ranks(3, body) == [None] * 3


def test_closed_session_lets_go() -> None:
    model = Model()
    session = session_of(model, micro_steps=2)
    adapter = session._adapter
    backward(model)
    session.close()
    assert adapter.closed
    model(torch.randn(4, WIDTH)).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert session.moo.counters["windows"] == 0
    with pytest.raises(BucketMOOError, match=r"after the session was closed.*do not close"):
        adapter.arrive()


def test_session_goes_with_its_model() -> None:
    """The hook on all optimizers must not keep it."""
    model = Model()
    gone = weakref.ref(session_of(model))
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    del model
    gc.collect()
    assert gone() is None
    other = Model()
    torch.optim.SGD(other.parameters(), lr=0.1).step()


class Obstructed(Plain):
    def obstacle(self, boundary: bool) -> LanguageError | None:
        return LanguageError(f"boundary {boundary}")


def test_what_an_adapter_knows_is_raised_before_anything_is_taken() -> None:
    model = Model()
    session = session_of(model, micro_steps=2, adapter=Obstructed(model))
    with pytest.raises(LanguageError, match="boundary False"):
        backward(model)
    assert not session.moo.in_window


@pytest.fixture
def order() -> Iterator[list[str]]:
    yield []


def test_a_callback_that_is_queued_by_a_callback_comes_last(order: list[str]) -> None:
    """What adapters build on whose wrapper queues its own callback late."""
    leaf = torch.ones(1, requires_grad=True)
    early, late = leaf * 2, leaf * 3
    early.register_hook(lambda _: after_backward(lambda: order.append("last")))
    wrapper = Variable._execution_engine.queue_callback
    leaf.register_hook(lambda _: wrapper(lambda: order.append("wrapper")))
    (early + late).backward()
    assert order == ["wrapper", "last"]
