"""`torchjd:NAME`: the weightings of TorchJD that see nothing but a Gram, one block after the other."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from bucketmoo_ds.aggregate.base import Aggregator, register_family
from bucketmoo_ds.errors import BucketMOOError, ConfigError, did_you_mean, one_of


def find_member(name: str) -> type[Aggregator]:
    """Returns the class of the rule `torchjd:NAME`, whose options are the arguments of TorchJD's aggregator NAME.

    For oracles and for rules that this package has not. Every block is a loop in Python and a copy to the host, so that
    the device is waited for; most rules of ours do the same for all blocks at once. The weights are TorchJD's own, in
    TorchJD's length, which is averaging's (1/K each for equal rows) for most; PCGrad's is the sum.

    Languages that are masked out are deleted. Randomness (PCGrad's orders) comes from the generator of the window. What
    TorchJD does with dependent rows, zero rows and noise is its own affair; weights that are not finite stop the run.

    Raises:
        ConfigError: TorchJD is not installed, has no such aggregator, or one that sees more than a Gram or keeps state
            from window to window, which would be in no checkpoint and the same for all blocks.
    """
    try:
        import torchjd
        from torchjd import aggregation
    except ImportError as error:
        raise ConfigError(
            f'aggregator = "torchjd:{name}": TorchJD cannot be imported ({error}); `pip install torchjd`, or take a '
            "rule of this package"
        ) from error
    known = {
        each: found
        for each, found in vars(aggregation).items()
        if inspect.isclass(found)
        and issubclass(found, aggregation.GramianWeightedAggregator)
        and found is not aggregation.GramianWeightedAggregator
        and not issubclass(found, torchjd.Stateful)
    }
    if name not in known:
        raise ConfigError(
            f'aggregator = "torchjd:{name}": TorchJD has no such aggregator that needs a Gram only and keeps no state, '
            f"expected {one_of(sorted(known))}{did_you_mean(name, known)}"
        )
    return _rule(name, known[name])


register_family("torchjd", find_member)


def _rule(name: str, aggregator: type[Any]) -> type[Aggregator]:
    """Returns a rule with the arguments of a TorchJD aggregator as its options."""
    options = [
        (each.name, Any) if each.default is each.empty else (each.name, Any, dataclasses.field(default=each.default))
        for each in inspect.signature(aggregator).parameters.values()
    ]
    return dataclasses.make_dataclass(
        f"TorchJD{name}", options, bases=(_TorchJD,), namespace={"_name": name, "_aggregator": aggregator}, frozen=True
    )


@dataclasses.dataclass(frozen=True)
class _TorchJD(Aggregator):
    """A weighting of TorchJD, made anew in each call."""

    _name: ClassVar[str]
    _aggregator: ClassVar[Callable[..., Any]]

    def __post_init__(self) -> None:
        self._weighting()

    def weights(self, gram: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """See `Aggregator.weights`.

        Raises:
            BucketMOOError: TorchJD gave weights that are not finite.
        """
        weighting = self._weighting()
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        result = torch.zeros_like(gram[..., 0])
        for block, present in enumerate(mask):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                found = weighting(gram[block][present][:, present].cpu())
            if not bool(found.isfinite().all()):
                raise BucketMOOError(
                    f'aggregator "torchjd:{self._name}": weights {found.tolist()}, which are not finite; take a rule '
                    "of this package, or aggregator_options that TorchJD copes with"
                )
            result[block, present] = found.to(result)
        return result

    def _weighting(self) -> Any:
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        try:
            made = self._aggregator(
                **{key: torch.tensor(value, dtype=torch.float64) if isinstance(value, list | tuple) else value
                   for key, value in options.items()}
            )  # fmt: skip
        except (ImportError, TypeError, ValueError) as error:
            raise ConfigError(f'aggregator "torchjd:{self._name}": {error}') from error
        return made.gramian_weighting
