"""What one would write without this package: the same ops in plain torch, in torch.compile, and with TorchJD.

torch multiplies matrices in the rows' dtype: at ten million elements its Gram is off by 3e-4 of the norms in float32
and by 2e-3 in bf16, far outside of what the ops here are held to. It is a peer in speed, not in accuracy.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from bucketmoo_ds.apps.bench.cases import WHOLE, Case
from bucketmoo_ds.apps.bench.inputs import SCALE, Inputs
from bucketmoo_ds.apps.bench.timing import Call

ITERATIONS = 100  # of Frank-Wolfe, and the step that ends it: TorchJD's defaults
SMALLEST_STEP = 1e-3
COMPILED = ("gram", "combine", "resolve")  # by torch.compile, with the solver of resolve left as it is


def peers(inputs: Inputs, *, compiled: bool) -> dict[str, Call]:
    """Returns the peers of a case that can run here, by name: `torch`, `compile` and `torchjd`.

    Args:
        inputs: what they get, the same tensors as the ops.
        compiled: whether torch.compile is one, on CUDA and on a shard of one segment. It compiles in its first call.
    """
    case = inputs.case
    function = _function(case)
    found: dict[str, Call] = {"torch": functools.partial(function, inputs)}
    if compiled and inputs.mask.is_cuda and case.op in COMPILED and case.segment == WHOLE:
        # What was compiled for other shapes counts towards a limit, beyond which it would silently run uncompiled.
        torch.compiler.reset()
        found["compile"] = functools.partial(torch.compile(function, dynamic=False), inputs)
    if importlib.util.find_spec("torchjd") is not None:
        if case.op == "min_norm":
            found["torchjd"] = lambda: torchjd_weights(inputs.gram)
        elif case.op == "resolve" and case.segment == WHOLE:
            found["torchjd"] = _torchjd_call(inputs)
    return found


def torchjd_weights(gram: Tensor) -> Tensor:
    """Returns TorchJD's MGDA weights, block by block: `[B, K, K]` in, `[B, K]` out."""
    weighting = _torchjd_weighting()
    return torch.stack([weighting(block) for block in gram])


@torch.compiler.disable
def frank_wolfe(gram: Tensor) -> Tensor:
    """Returns min-norm weights by Frank-Wolfe (Sener & Koltun, Multi-Task Learning as Multi-Objective Optimization,
    2018, algorithm 2), all blocks at once: `[B, K, K]` in, `[B, K]` out. It ends as soon as no block takes a step of
    `SMALLEST_STEP`."""
    count = gram.shape[-1]
    weights = torch.full_like(gram[..., 0], 1.0 / count)
    for _ in range(ITERATIONS):
        products = (gram @ weights[..., None])[..., 0]
        vertex = torch.nn.functional.one_hot(products.argmin(-1), count).to(gram.dtype)
        mixed = (products * vertex).sum(-1)
        own = (products * weights).sum(-1)
        other = (gram.diagonal(dim1=-2, dim2=-1) * vertex).sum(-1)
        # The shortest point of the segment from the weights to the vertex; a segment of length 0 has one point.
        step = ((own - mixed) / (own + other - 2 * mixed)).nan_to_num(0.0).clamp(0.0, 1.0)
        weights = torch.lerp(weights, vertex, step[..., None])
        if float(step.max()) < SMALLEST_STEP:
            break
    return weights


def _function(case: Case) -> Callable[[Inputs], object]:
    match case.op:
        case "gram":
            return lambda inputs: _gram(torch.stack(inputs.rows), inputs)
        case "combine":
            return lambda inputs: _combine(torch.stack(inputs.rows), inputs.weights, inputs)
        case "accumulate_gram":
            return _accumulate_gram
        case "min_norm":
            return lambda inputs: frank_wolfe(inputs.gram)
        case _:
            return _resolve


def _gram(stacked: Tensor, inputs: Inputs) -> Tensor:
    """`[K, S]` in, `[B, K, K]` out."""
    case = inputs.case
    if case.segment == WHOLE:
        return (stacked @ stacked.mT)[None]
    pieces = stacked.view(case.languages, case.segments, case.segment).transpose(0, 1)
    grams = torch.bmm(pieces, pieces.mT)
    total = grams.new_zeros(case.num_blocks, case.languages, case.languages)
    return total.index_add_(0, inputs.cells.to(total.device), grams)


def _combine(stacked: Tensor, weights: Tensor, inputs: Inputs) -> Tensor:
    """`[K, S]` and `[B, K]` in, `[S]` out."""
    case, narrow = inputs.case, weights.to(stacked.dtype)
    if case.segment == WHOLE:
        return (narrow @ stacked)[0]
    pieces = stacked.view(case.languages, case.segments, case.segment).transpose(0, 1)
    return torch.bmm(narrow[inputs.cells.to(narrow.device)][:, None], pieces).flatten()


def _accumulate_gram(inputs: Inputs) -> Tensor:
    for row, gradient in zip(inputs.rows, inputs.incoming, strict=True):
        row.add_(gradient, alpha=SCALE)
    return _gram(torch.stack(inputs.rows), inputs)


def _resolve(inputs: Inputs) -> Tensor:
    stacked = torch.stack(inputs.rows)
    return _combine(stacked, frank_wolfe(_gram(stacked, inputs).double()), inputs)


def _torchjd_call(inputs: Inputs) -> Call:
    from torchjd.aggregation import MGDA

    aggregator = MGDA()
    return lambda: aggregator(torch.stack(inputs.rows))


@functools.cache
def _torchjd_weighting() -> Callable[[Tensor], Tensor]:
    from torchjd.aggregation import MGDAWeighting

    weighting: Callable[[Tensor], Tensor] = MGDAWeighting()
    return weighting
