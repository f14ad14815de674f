"""The ways in which models are trained: precisions, compilation, dropout, copies, and passes that come in odd order."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from draw import SEED
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from unit.mixed import stack
from unit.mixed.stack import LANGUAGES, Batch, Shape, Stack, draw_batch, rows_of

from bucketmoo_ds.errors import BucketMOOError, LanguageError

SHAPE = Shape(("attention", "layer norm", "lora", "twice", "rms norm", "row-wise"), tied=True, positions="shared")


def drawn(shape: Shape = SHAPE, dtype: torch.dtype = torch.float64, packed: bool = True) -> tuple[Stack, Batch]:
    return stack.made(shape, dtype, SEED), draw_batch(torch.Generator().manual_seed(SEED), packed, shape.pooled)


def handed(session: stack.MixedSession) -> Tensor:
    weights = torch.rand(len(session.plan.blocks), len(LANGUAGES), generator=torch.Generator().manual_seed(SEED))
    stack.hand(session, weights.double())
    return weights.double()


def backward(model: Callable[..., Tensor], batch: Batch, factor: float = 1.0) -> None:
    torch.manual_seed(SEED)
    (factor * model(**batch.inputs, language=batch.language)).backward()


def check(
    session: stack.MixedSession, model: nn.Module, plain: nn.Module, batch: Batch, weights: Tensor, tolerance: float
) -> None:
    """The gradients that have come, against rows of a plain model."""
    rows = [rows_of(plain, batch.only(each), SEED) for each in range(len(LANGUAGES))]
    for name, block in stack.block_of(session).items():
        parts = torch.stack([weights[block, each] * rows[each][name].double() for each in range(len(LANGUAGES))])
        got = model.get_parameter(name).grad
        assert got is not None
        assert (got.double() - parts.sum(0)).norm() <= tolerance * parts.norm(), name


# A loss over other targets has another scale, and its gradients are rounded otherwise in each of the twenty operations
# that they pass: 32 roundings by 2^-9 (2^-12) at most.
SHALLOW = Shape(("layer norm", "linear", "lora"))
COARSE = 2**-4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, COARSE), (torch.float16, COARSE / 8)])
def test_16_bits(dtype: torch.dtype, tolerance: float) -> None:
    model, batch = drawn(SHALLOW, dtype)
    plain = copy.deepcopy(model)
    session = stack.register(model)
    weights = handed(session)
    backward(model, batch)
    assert all(each.grad is None or each.grad.dtype == dtype for each in model.parameters())
    check(session, model, plain, batch, weights, tolerance)
    session.end_window()
    expected, square = stack.expected_grams(session, plain, batch, SEED)
    assert ((stack.grams(session) - expected).abs() <= tolerance * square.clamp(min=1e-3 * square.max())).all()


class Autocast(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(**inputs)


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside: bool) -> None:
    """Parameters of float32; around the registered model, and inside of it."""
    model, batch = drawn(SHALLOW, torch.float32)
    model = Autocast(model) if inside else model
    plain = copy.deepcopy(model)
    session = stack.register(model)
    weights = handed(session)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
        backward(model, batch)
        check(session, model, plain, batch, weights, COARSE)
    assert all(each.grad is None or each.grad.dtype == torch.float32 for each in model.parameters())


def test_compiled() -> None:
    """Weights and languages of the batch, not of the trace: they change from window to window, of which every second
    takes Grams. Compiled first, or registered first, as it falls."""
    first = ("compile", "register")[SEED % 2]
    model, _ = drawn(Shape(("layer norm", "twice"), tied=True))
    plain = copy.deepcopy(model)
    torch._dynamo.reset()
    if first == "register":
        session = stack.register(model, gram_every=2)
    compiled: Any = torch.compile(model, backend="aot_eager")
    if first == "compile":
        session = stack.register(compiled, gram_every=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    generator = torch.Generator().manual_seed(SEED)
    for window in range(4):
        batch = draw_batch(generator, packed=True, pooled=False, sequences=7)
        weights = torch.rand(len(session.plan.blocks), len(LANGUAGES), dtype=torch.float64)
        stack.hand(session, weights)
        optimizer.zero_grad()
        backward(compiled, batch)
        check(session, model, plain, batch, weights, 1e-12)
        optimizer.step()
        if window % 2 == 0:
            expected, square = stack.expected_grams(session, plain, batch, SEED)
            assert ((stack.grams(session) - expected).abs() <= 4e-12 * square.clamp(min=1e-6 * square.max())).all()


def test_copies_are_plain_models() -> None:
    model, batch = drawn()
    plain = copy.deepcopy(model)
    session = stack.register(model)
    handed(session)
    backward(model, batch)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), torch.load(file, weights_only=False), AveragedModel(model).module]
    expected = rows_of(plain, batch.inputs, SEED)
    for each in copies:
        assert [type(module) for module in each.modules()] == [type(module) for module in plain.modules()]
        found = rows_of(each, batch.inputs, SEED)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert isinstance(model.head, nn.Linear)
    assert [repr(each) for each in model.modules()] == [repr(each) for each in plain.modules()]
    session.close()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert model.state_dict().keys() == plain.state_dict().keys()
    found = rows_of(model, batch.inputs, SEED)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_several_passes_of_one_backward() -> None:
    """Their gradients add up; a Gram is of the products within each pass, over the tokens of those."""
    model, batch = drawn()
    other = draw_batch(torch.Generator().manual_seed(SEED + 1), packed=True, pooled=False)
    plain = copy.deepcopy(model)
    session = stack.register(model)
    weights = handed(session)
    counts = [each.counts().double() for each in (batch, other)]
    total = sum(int(each.sum()) for each in counts)
    torch.manual_seed(SEED)
    losses = [model(**each.inputs, language=each.language) for each in (batch, other)]
    sum(loss * int(count.sum()) / total for loss, count in zip(losses, counts, strict=True)).backward()  # type: ignore[union-attr]
    torch.manual_seed(SEED)
    state = torch.get_rng_state()
    rows = []
    for each in (batch, other):
        torch.set_rng_state(state)
        plain(**each.inputs)
        following = torch.get_rng_state()
        rows.append([])
        for language in range(len(LANGUAGES)):
            plain.zero_grad()
            torch.set_rng_state(state)
            plain(**each.only(language)).backward()
            rows[-1].append({name: p.grad.clone() for name, p in plain.named_parameters() if p.grad is not None})
        state = following
    for name, block in stack.block_of(session).items():
        parts = [
            weights[block, each] * count[each] / sum(counts)[each] * row[each][name]  # type: ignore[index]
            for row, count in zip(rows, counts, strict=True)
            for each in range(len(LANGUAGES))
        ]
        got = model.get_parameter(name).grad
        assert got is not None
        assert (got - sum(parts)).abs().max() <= 1e-12 * sum(each.abs() for each in parts).max(), name  # type: ignore[union-attr]
    session.end_window()
    for name, block in stack.block_of(session).items():
        products = [
            row[0][name].mul(row[1][name]).sum() * count[0] * count[1] for row, count in zip(rows, counts, strict=True)
        ]
        expected = sum(products) / sum(count[0] * count[1] for count in counts)
        scale = max(row[0][name].norm() * row[1][name].norm() for row in rows)
        assert abs(stack.grams(session)[block, 0, 1] - expected) <= 1e-11 * scale, name


def test_passes_between_forward_and_backward() -> None:
    """Under `no_grad`, in evaluation, and of graphs that nobody follows: they leave the micro-step alone."""
    model, batch = drawn(Shape(("attention", "layer norm", "twice")))
    plain = copy.deepcopy(model)
    session = stack.register(model)
    weights = handed(session)
    loss = model(**batch.inputs, language=batch.language)
    with torch.no_grad():
        model(**batch.inputs)
    model.eval()
    for _ in range(3):
        model(**batch.inputs, language=batch.language)
    model.train()
    loss.backward()
    check(session, model, plain, batch, weights, 1e-12)
    session.end_window()
    assert session.last is not None
    assert session.last.target_tokens == tuple(batch.counts().tolist())
    assert not session._passes


def test_backward_twice_over_one_pass() -> None:
    model, batch = drawn(Shape(("linear",)))
    session = stack.register(model)
    loss = model(**batch.inputs, language=batch.language)
    loss.backward(retain_graph=True)
    with pytest.raises(LanguageError, match="a backward without a forward pass of the model since the last one"):
        loss.backward()
    session.abandon()
    assert all(each.grad is None for each in model.parameters())
    backward(model, batch)
    session.end_window()


def test_an_inner_module_called_directly() -> None:
    model, _ = drawn(Shape(("linear",)))
    session = stack.register(model)
    rows = model.layers[0](torch.randn(2, 3, stack.WIDTH, dtype=torch.float64))
    with pytest.raises(BucketMOOError, match=r'backward through module "layers.0" outside of a forward pass'):
        rows.sum().backward()
    assert session.window.micro_steps == 0


def test_an_error_that_is_caught() -> None:
    """After `abandon` the window begins anew; without it the optimizer does not step."""
    model, batch = drawn(Shape(("twice", "layer norm")))
    plain = copy.deepcopy(model)
    session = stack.register(model)
    weights = handed(session)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def fail(gradient: Tensor) -> None:
        raise RuntimeError("out of memory")

    def fail_in_backward(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(fail)

    handle = model.layers[0].linear.register_forward_hook(fail_in_backward)
    with pytest.raises(RuntimeError, match="out of memory"):
        backward(model, batch)
    handle.remove()
    with pytest.raises(BucketMOOError, match="the last backward did not come to its end"):
        optimizer.step()
    session.abandon()
    backward(model, batch)
    check(session, model, plain, batch, weights, 1e-12)
    optimizer.step()
    assert session.last is not None
    assert session.last.window == 0
