"""`solve` and `weights`: what holds for every aggregator (masks, non-finite Grams, normalisation), in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bucketmoo_ds.aggregate._factors import averaging, factors, mean_one
from bucketmoo_ds.aggregate.base import Aggregator, State, create
from bucketmoo_ds.config import BY_LOSS, CHOICES
from bucketmoo_ds.errors import ConfigError, did_you_mean, one_of
from bucketmoo_ds.transfer import to_device

WEIGHTS = "weights"  # the entry of a state that `weight_smoothing` keeps

# `rescale="mean"` leaves a combined row alone whose norm is below this times the sum of the norms of its parts: what
# is left after such a cancellation is rounding, and blowing it up to the norm of the mean would be a random step.
CANCELLED = 1e-6
# How much of the largest entry of a Gram may be lost to its rounding: a few units of its own precision, times K.
ASYMMETRY = {torch.bfloat16: 1e-1, torch.float16: 1e-2, torch.float32: 1e-4, torch.float64: 1e-9}


def solve(
    gram: Tensor,
    mask: Tensor,
    aggregator: Aggregator,
    *,
    normalize: str = "none",
    rescale: str = "none",
    preference: Tensor | None = None,
    losses: Tensor | None = None,
    noisy: Tensor | None = None,
    weight_smoothing: float = 0.0,
    state: State | None = None,
    generator: torch.Generator,
) -> Tensor:
    """Returns the weights of the languages in every block, all blocks at once.

    Multiplying all weights of a block by a positive number keeps its direction: a combined row that harms no language
    still harms none after `rescale`. With `normalize` or `preference` a method's guarantees hold for the scaled rows:
    signs of inner products, and so descent, carry over to the rows themselves; MGDA's `<g_i, d> >= ||d||^2` does not.

    Args:
        gram: `[B, K, K]` float64, symmetric, summed over all ranks.
        mask: `[B, K]` bool, the languages that count in a block. The others get exactly 0, and their entries of the
            Gram, NaN included, influence nothing.
        aggregator: the rule; see `create`.
        normalize: what rows are divided by before the rule combines them: their norms (`l2`), their languages' losses
            (`loss`) or both (`loss_l2`), times the median of these (of two middle ones the lower; one that is 0 does
            not count, and its row stays as it is). Rows of equal norm, or equal losses, get the weights of `none`.
        rescale: `mean` scales the combined row to the norm of what `mean` gives, unless it has cancelled to rounding.
        preference: `[K]`, a positive number for each language, 1 each by default. With D = diag(preference), divided by
            its mean over the languages of the mask, the rule sees the rows `D g` (their Gram is `D G D`), and the
            weights are D times its own: `mean` becomes the weighted mean of the rows.
        losses: `[K]`, each language's mean loss, where `normalize` or the rule asks for it.
        noisy: `[B, K, K]` float64, the Gram of the rows as they are, where `gram` has been freed of their noise.
            Lengths are measured by it: what `normalize` and `rescale` go by, and that the combined row is no longer
            than the longest row, or than the rule makes it in units of that. A rule that balances lengths (a projection
            adds the more of a row the shorter that is) could otherwise take a long step of the noise that it is not
            shown. Convex combinations are never touched.
        weight_smoothing: see `smoothed`.
        state: what is kept of these blocks from window to window, as `first_state` with the blocks in front; its
            entries are replaced by the new ones. Left out, it is that of a first window.
        generator: the only source of randomness, in the same state on every rank.

    Returns:
        `[B, K]` float64. Blocks whose unmasked Gram or losses are not finite are averaged (whether to skip the step is
        the caller's decision), a single language gets 1, no language at all zeros.

    Raises:
        ConfigError: an unknown `normalize` or `rescale`, or no losses where they are needed.
    """
    for option, value in (("normalize", normalize), ("rescale", rescale)):
        known = CHOICES[option]
        if value not in known:
            raise ConfigError(f'{option} = "{value}": unknown, expected {one_of(known)}{did_you_mean(value, known)}')
    if losses is None and (aggregator.uses_losses or normalize in BY_LOSS):
        needs = "the aggregator" if aggregator.uses_losses else f'normalize = "{normalize}"'
        raise ConfigError(f"losses: missing; {needs} needs a number for each language")
    pairs = mask.unsqueeze(-1) & mask.unsqueeze(-2)
    gram = torch.where(pairs, gram, 0.0)
    as_it_is = gram if noisy is None else torch.where(pairs, noisy, 0.0)
    entries = gram if noisy is None else gram + as_it_is
    finite = entries.isfinite().flatten(1).all(-1)
    if losses is not None:
        losses = torch.where(mask, losses, 1.0)
        finite = finite & losses.isfinite().all(-1)
        losses = torch.where(finite.unsqueeze(-1), losses, 1.0)
    hard = finite & (mask.sum(-1) > 1)
    # Every block is shown to the rule: to pick some out would be a question to the device, and a rule that draws random
    # numbers draws as many whatever the data. In place of blocks without a choice stand orthogonal rows, soon solved.
    easy = torch.eye(mask.shape[-1], dtype=gram.dtype, device=gram.device)
    shown, counted = torch.where(hard[:, None, None], gram, easy), mask | ~hard.unsqueeze(-1)
    measured = shown if noisy is None else torch.where(hard[:, None, None], as_it_is, easy)
    if aggregator.uses_losses:
        assert losses is not None
        aggregator = aggregator.with_losses(losses, mean_one(counted, preference))
    if state is None:
        first = first_state(aggregator, mask.shape[-1], weight_smoothing)
        state = {
            name: to_device(each, torch.float64, gram.device).expand(len(gram), *each.shape)
            for name, each in first.items()
        }
    own = {name: each for name, each in state.items() if name != WEIGHTS}
    # The rules do not depend on the scale of a block; near 1 nothing overflows.
    of_one = _of_size_one(shown)
    scale = factors(of_one if noisy is None else _of_size_one(measured), counted, normalize, losses, preference)
    if scale is None:
        result, new = aggregator.step(of_one, counted, own, generator)
    else:
        scaled = _of_size_one(of_one * scale.unsqueeze(-1) * scale.unsqueeze(-2))
        result, new = aggregator.step(scaled, counted, own, generator)
        result = result * scale
    if noisy is not None:
        result = _no_longer_than_meant(result, shown, measured)
    if weight_smoothing:
        even = averaging(counted, preference)
        result, new[WEIGHTS] = smoothed(result, counted, even, state[WEIGHTS], weight_smoothing)
    for name, each in new.items():
        state[name] = torch.where(_changing(hard, mask, each.ndim), each, state[name])
    if rescale == "mean":
        result = _to_norm_of_mean(result, measured, averaging(counted, preference))
    return torch.where(hard.unsqueeze(-1), result, averaging(mask, preference))


def first_state(aggregator: Aggregator, languages: int, weight_smoothing: float) -> State:
    """Returns what is kept of one block before its first window; see `Stateful.start`."""
    smoothing = {WEIGHTS: torch.ones(languages, dtype=torch.float64)} if weight_smoothing else {}
    return aggregator.start(languages) | smoothing


def smoothed(weights: Tensor, mask: Tensor, even: Tensor, before: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Returns `share w_before + (1 - share) weights`, the moving average of weights (CR-MOGM: Zhou et al., On the
    Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond, NeurIPS 2022), and what is to be kept.

    What is kept of a language is its weight over what averaging would give it among those that took part: so it means
    the same beside others and fewer of them. All start at averaging.

    Args:
        weights, mask: `[B, K]`.
        even: `[B, K]`, the weights of averaging, `preference` counted.
        before: `[B, K]`, what was kept.
        share: a in [0, 1).
    """
    kept = torch.where(mask, share * before + (1.0 - share) * weights / torch.where(mask, even, 1.0), before)
    return torch.where(mask, kept * even, 0.0), kept


def weights(
    gram: Tensor | Sequence[Any],
    aggregator: str = "upgrad",
    mask: Tensor | Sequence[Any] | None = None,
    *,
    normalize: str = "none",
    rescale: str = "none",
    preference: Tensor | Sequence[float] | None = None,
    losses: Tensor | Sequence[float] | None = None,
    seed: int = 0,
    **options: Any,
) -> Tensor:
    """Returns the weights that an aggregator gives to the rows of which `gram` holds the inner products.

    >>> import torch
    >>> rows = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> weights(rows @ rows.T, "mgda")
    tensor([0.2000, 0.8000], dtype=torch.float64)

    Args:
        gram: `[B, K, K]`, or `[K, K]` for one block; float16, bfloat16, float32 or float64, or nested lists.
        aggregator: a name that `names()` lists.
        mask: `[B, K]` (or `[K]`) bool, or nested lists: the languages that count; all by default.
        normalize: see `solve`.
        rescale: see `solve`.
        preference: see `solve`.
        losses: see `solve`.
        seed: seeds the random orders of `pcgrad`.
        options: options of the aggregator, such as `c=0.4` for `cagrad`.

    Returns:
        `[B, K]` (or `[K]`) float64 on the Gram's device.

    Raises:
        ConfigError: (a ValueError) an unknown aggregator or option, or a bad value of one.
        ValueError: a Gram, mask, preference or loss of the wrong shape or dtype, or a Gram that is not symmetric, or
            whose diagonal is negative, where it is finite; or a preference that is not positive.
    """
    rule = create(aggregator, **options)
    gram = _tensor("gram", gram, torch.float64)
    if mask is None:
        mask = torch.ones(gram.shape[:-1], dtype=torch.bool, device=gram.device)
    mask = _tensor("mask", mask, torch.bool)
    _check(gram, mask)
    blocks, masks = gram.to(torch.float64).reshape(-1, *gram.shape[-2:]), mask.reshape(-1, mask.shape[-1])
    generator = torch.Generator().manual_seed(seed)
    result = solve(
        blocks,
        masks,
        rule,
        normalize=normalize,
        rescale=rescale,
        preference=_by_language("preference", preference, blocks, positive=True),
        losses=_by_language("losses", losses, blocks),
        generator=generator,
    )
    return result.reshape(mask.shape)


def _by_language(
    name: str, value: Tensor | Sequence[float] | None, gram: Tensor, *, positive: bool = False
) -> Tensor | None:
    """Returns numbers that were handed in from outside as `[K]` float64, on the Gram's device."""
    if value is None:
        return None
    told = _tensor(name, value, torch.float64).to(device=gram.device, dtype=torch.float64)
    if told.shape != gram.shape[-1:]:
        raise ValueError(f"{name}: shape {list(told.shape)}: expected {gram.shape[-1]} numbers, one for each row")
    if positive and not bool((told.isfinite() & (told > 0.0)).all()):
        raise ValueError(f"{name} = {told.tolist()}: expected positive numbers; mask a row that counts 0")
    return told


def _of_size_one(gram: Tensor) -> Tensor:
    """Returns the Grams of the rows divided by the norm of the longest of their block."""
    return gram / gram.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=torch.finfo(gram.dtype).tiny)[:, None, None]


def _changing(hard: Tensor, mask: Tensor, dimensions: int) -> Tensor:
    """Returns which entries of a state change: of blocks that have a choice, those of languages that took part."""
    result = hard.view(-1, *[1] * (dimensions - 1))
    for place in range(1, dimensions):
        sizes = [-1 if each == place else 1 for each in range(1, dimensions)]
        result = result & mask.view(len(mask), *sizes)
    return result


def _tensor(name: str, value: Tensor | Sequence[Any], dtype: torch.dtype) -> Tensor:
    """Returns what was handed in from outside as a tensor; a tensor as it is."""
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(value, dtype=dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: {error}: expected a tensor, or nested lists of equal length") from error


def _no_longer_than_meant(weights: Tensor, gram: Tensor, measured: Tensor) -> Tensor:
    """Returns the weights, scaled down where the combined row is longer than the longest row, and longer in units of
    that than by the Gram that the rule saw."""
    seen, longest = (
        each.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True).clamp(min=0.0).sqrt() for each in (gram, measured)
    )
    meant, got = _norm(weights, gram), _norm(weights, measured)
    limit = longest * (meant / torch.where(seen > 0.0, seen, 1.0)).clamp(min=1.0)
    return weights * torch.where(got > limit, limit / torch.where(got > 0.0, got, 1.0), 1.0)


def _to_norm_of_mean(weights: Tensor, gram: Tensor, mean: Tensor) -> Tensor:
    """Returns the weights times the norm of the mean row, which the weights `mean` give, over the combined row's."""
    wanted, got = _norm(mean, gram), _norm(weights, gram)
    parts = (weights.abs() * gram.diagonal(dim1=-2, dim2=-1).clamp(min=0.0).sqrt()).sum(-1, keepdim=True)
    cancelled = got <= CANCELLED * parts
    return weights * torch.where(cancelled, 1.0, wanted / torch.where(cancelled, 1.0, got))


def _norm(weights: Tensor, gram: Tensor) -> Tensor:
    """Returns the norms `[B, 1]` of the combined rows."""
    return (weights * (gram * weights.unsqueeze(-2)).sum(-1)).sum(-1, keepdim=True).clamp(min=0.0).sqrt()


def _check(gram: Tensor, mask: Tensor) -> None:
    """Raises a ValueError that says what is wrong with a Gram or mask handed in from outside."""
    if gram.ndim not in (2, 3) or gram.shape[-1] != gram.shape[-2] or gram.shape[-1] == 0:
        raise ValueError(f"gram: shape {list(gram.shape)}: expected [B, K, K] or [K, K] with K at least 1")
    if gram.dtype not in ASYMMETRY:
        raise ValueError(f"gram: dtype {gram.dtype}: expected {', '.join(str(dtype) for dtype in ASYMMETRY)}")
    if mask.dtype != torch.bool or mask.shape != gram.shape[:-1]:
        raise ValueError(
            f"mask: {mask.dtype} of shape {list(mask.shape)}: expected torch.bool of shape {list(gram.shape[:-1])}"
        )
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    used = (mask.unsqueeze(-1) & mask.unsqueeze(-2)) & gram.isfinite()
    entries = torch.where(used, gram, 0.0).to(torch.float64)
    if bool((torch.where(mask & diagonal.isfinite(), diagonal, 0.0) < 0.0).any()):
        raise ValueError("gram: a negative diagonal entry: expected the inner products of rows, gram = rows @ rows.T")
    size = entries.abs().amax((-2, -1), keepdim=True)
    difference = torch.where(used & used.mT, entries - entries.mT, 0.0)
    if bool((difference.abs() > ASYMMETRY[gram.dtype] * size).any()):
        raise ValueError("gram: not symmetric: expected the inner products of rows, gram = rows @ rows.T")
