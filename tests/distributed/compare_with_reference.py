"""Worker: trains windows with bucket_moo and compares gradients, weights, norms and updates with the reference.

The reference is `bucketmoo_ds.reference`: one process, float64, fed with the gradients that autograd gave every rank.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import struct
from typing import Any

import torch
import torch.distributed as dist
import toy
import worker
from torch import Tensor

import bucketmoo_ds
from bucketmoo_ds import reference
from bucketmoo_ds.choices import create_aggregator

LEARNING_RATE = 0.05
WEIGHT_DECAYS = (0.1, 0.0)
WINDOWS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One training run; the fields are DeepSpeed's and our settings, the toy model's and the data's."""

    seed: int
    stage: int
    micro_steps: int
    languages: int
    dtype: str = "fp32"
    accumulate: str | None = None
    bucket_size: int = 1500
    overlap: bool = False
    round_robin: bool = False
    clip: float = 0.0
    groups: bool = False
    aggregator: str = "mgda"
    granularity: str = "bucket"
    weighting: str = "language"
    normalize: str = "none"
    rescale: str = "none"
    ragged: bool = True
    empty: bool = False
    tied: bool = False
    frozen: bool = False
    adapters: int = 0

    def settings(self, mode: str) -> dict[str, Any]:
        """The DeepSpeed JSON."""
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": toy.SEQUENCES,
            "gradient_accumulation_steps": self.micro_steps,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": self.bucket_size,
                "overlap_comm": self.overlap,
                "round_robin_gradients": self.round_robin,
            },
            "gradient_clipping": self.clip,
            "steps_per_print": 10**9,
            "bucket_moo": {
                "languages": [f"l{index}" for index in range(self.languages)],
                "aggregator": self.aggregator,
                "granularity": self.granularity,
                "weighting": self.weighting,
                "normalize": self.normalize,
                "rescale": self.rescale,
                "seed": self.seed,
                "mode": mode,
            },
        }
        if self.dtype != "fp32":
            config[self.dtype] = {"enabled": True}
        if self.accumulate:
            config["data_types"] = {"grad_accum_dtype": self.accumulate}
        return config

    def table(self, window: int) -> list[list[int]]:
        """The languages of the slots, [M][W]: as many different ones as there are slots, in random places. A rank keeps
        its language on ZeRO-1."""
        generator = torch.Generator().manual_seed(self.seed + window)
        rows = 1 if self.stage == 1 else self.micro_steps
        slots = [(2 * window + slot) % self.languages for slot in range(rows * worker.WORLD_SIZE)]
        places = torch.randperm(len(slots), generator=generator).tolist()
        table = [
            [slots[place] for place in places[start : start + worker.WORLD_SIZE]]
            for start in range(0, len(slots), worker.WORLD_SIZE)
        ]
        return table * (self.micro_steps // rows)

    def empty_slot(self) -> tuple[int, int] | None:
        """A slot of every window whose micro-batch has no target token."""
        generator = torch.Generator().manual_seed(self.seed)
        step, rank = (int(torch.randint(n, (), generator=generator)) for n in (self.micro_steps, worker.WORLD_SIZE))
        return (step, rank) if self.empty else None


def run(modes: list[str], **fields: Any) -> dict[str, Any]:
    """Trains the same case once in every mode; only the first run is compared with the reference.

    Returns:
        the largest errors, and for every mode whether it streamed and the hash of all final parameters.
    """
    case = Case(**fields)
    runs = [train(case, mode, compare=position == 0) for position, mode in enumerate(modes)]
    return runs[0] | {name: [run[name] for run in runs] for name in ("parameters", "streaming")}


def train(case: Case, mode: str, *, compare: bool) -> dict[str, Any]:
    torch.manual_seed(case.seed)
    model = toy.ToyLM(tied=case.tied, frozen=case.frozen, adapters=case.adapters)
    twin = copy.deepcopy(model)
    engine = make_engine(case, mode, model)
    twin = twin.to(dtype=next(engine.module.parameters()).dtype)
    generator = torch.Generator().manual_seed(case.seed * 100 + worker.RANK)
    errors: list[dict[str, float]] = []
    for window in range(WINDOWS):
        twin.load_state_dict(engine.module.state_dict())
        micro_gradients = []
        for step, row in enumerate(case.table(window)):
            language = row[worker.RANK]
            empty = case.empty_slot() == (step, worker.RANK)
            batch = toy.micro_batch(language, generator, ragged=case.ragged, empty=empty)
            if compare:
                micro_gradients.append(own_gradient(twin, batch, language, case.micro_steps))
            engine.backward(engine(**batch, language=f"l{language}"))
            if step < case.micro_steps - 1:
                engine.step()
        before = whole(engine.optimizer, engine.optimizer.single_partition_of_fp32_groups)
        gradient = whole(engine.optimizer, [part.flat_partition for part in averaged(engine.optimizer)])
        engine.step()
        after = whole(engine.optimizer, engine.optimizer.single_partition_of_fp32_groups)
        if compare:
            found = {"before": before, "gradient": gradient, "after": after}
            errors.append(compare_window(case, engine, window=window, micro_gradients=micro_gradients, **found))
    worst = {name: max(error[name] for error in errors) for name in errors[0]} if compare else {}
    return worst | {"parameters": worker.checksum(engine.module.parameters()), "streaming": engine.moo.streaming}


def make_engine(case: Case, mode: str, model: torch.nn.Module) -> Any:
    params: list[Any] = [p for p in model.parameters() if p.requires_grad]
    if case.groups:
        params = [{"params": params[index::2], "weight_decay": WEIGHT_DECAYS[index]} for index in (0, 1)]
    optimizer = torch.optim.SGD(params, lr=LEARNING_RATE)
    engine, *_ = bucketmoo_ds.initialize(model=model, optimizer=optimizer, config=case.settings(mode))
    return engine


def own_gradient(
    twin: torch.nn.Module, batch: dict[str, Tensor], language: int, micro_steps: int
) -> reference.MicroGradient:
    """The gradient that DeepSpeed is handed for this micro-batch, before anything is reduced."""
    twin.zero_grad()
    (twin(**batch) / micro_steps).backward()
    gradient = {
        name: (torch.zeros_like(p) if p.grad is None else p.grad.clone()).double()
        for name, p in twin.named_parameters()
        if p.requires_grad
    }
    return reference.MicroGradient(language, toy.tokens_of(batch), gradient)


def compare_window(
    case: Case,
    engine: Any,
    *,
    window: int,
    micro_gradients: list[reference.MicroGradient],
    before: dict[str, Tensor],
    gradient: dict[str, Tensor],
    after: dict[str, Tensor],
) -> dict[str, float]:
    """Returns the errors of one window.

    * `gradient`: of a block's combined gradient, relative to the sum of the norms of its weighted rows. That is what
      is added up, so it is what rounding is relative to; where rows nearly cancel, the combined norm is much smaller.
    * `relative`: the same, relative to the norm of the combined gradient.
    * `weights`: of a block's weights, absolute.
    * `norm`: of the global norm that DeepSpeed clips by, relative.
    * `update`: of the float32 parameters after the step (SGD, clipped), relative to their norm.
    """
    everyone: list[Any] = [None] * worker.WORLD_SIZE
    dist.all_gather_object(everyone, micro_gradients)
    micros = [micro for rank in everyone for micro in rank]
    plan, last = engine.moo.plan, engine.moo.last
    blocks = blocks_of(plan)
    expected, weights = reference.resolve_window(
        micros,
        blocks,
        micro_steps=case.micro_steps,
        aggregator=create_aggregator(engine.moo.config),
        weighting=case.weighting,
        normalize=case.normalize,
        rescale=case.rescale,
        seed=random_order_seed(case.seed, window),
    )
    errors = {"gradient": 0.0, "relative": 0.0, "weights": 0.0}
    for number, (block, names) in enumerate(blocks.items()):
        found = torch.cat([gradient[name].flatten() for name in names])
        wanted = torch.cat([expected[name].flatten() for name in names])
        difference = float((found - wanted).norm())
        diagonal = last.gram[number].diagonal()[list(last.present)]
        scale = float((weights[block].abs() * diagonal.sqrt()).sum())
        ours = last.weights[number, list(last.present)]
        errors["gradient"] = max(errors["gradient"], ratio(difference, scale))
        errors["relative"] = max(errors["relative"], ratio(difference, float(wanted.norm())))
        errors["weights"] = max(errors["weights"], float((ours - weights[block]).abs().max()))
    norm = float(torch.cat([value.flatten() for value in expected.values()]).norm())
    errors["norm"] = ratio(abs(float(engine.get_global_grad_norm()) - norm), norm)
    errors["update"] = update_error(case, engine, before=before, expected=expected, after=after, norm=norm)
    return errors


def update_error(
    case: Case,
    engine: Any,
    *,
    before: dict[str, Tensor],
    expected: dict[str, Tensor],
    after: dict[str, Tensor],
    norm: float,
) -> float:
    # DeepSpeed divides by (norm + 1e-6) / clip where that is above 1 (unscale_and_clip_grads).
    divisor = max((norm + 1e-6) / case.clip, 1.0) if case.clip else 1.0
    worst = 0.0
    decays = WEIGHT_DECAYS if case.groups else (0.0,)
    for decay, params in zip(decays, engine.optimizer.round_robin_bit16_groups, strict=True):
        for param in params:
            name = engine.optimizer.param_names[param]
            step = expected[name].flatten() / divisor + decay * before[name]
            wanted = before[name] - LEARNING_RATE * step
            worst = max(worst, ratio(float((after[name] - wanted).norm()), float(wanted.norm())))
    return worst


def ratio(error: float, scale: float) -> float:
    """0 of 0 is no error: a parameter that nothing uses has no gradient."""
    return error / scale if error else 0.0


def random_order_seed(seed: int, window: int) -> int:
    """As `BucketMOO` documents it: random orders are derived from (seed, window)."""
    digest = hashlib.blake2b(struct.pack("<qq", seed, window), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


def blocks_of(plan: Any) -> dict[str, list[str]]:
    blocks: dict[str, list[str]] = {name: [] for name in plan.blocks}
    for parameter, block in zip(plan.parameters, plan.block_of, strict=True):
        blocks[plan.blocks[block]].append(parameter.name)
    return blocks


def averaged(optimizer: Any) -> list[Any]:
    """The gradients that the optimizer is about to use, this rank's part of every parameter group."""
    return [optimizer.averaged_gradients[group] for group in range(len(optimizer.bit16_groups))]


def whole(optimizer: Any, partitions: list[Tensor]) -> dict[str, Tensor]:
    """Puts flat partitions of all ranks together; returns float64 by parameter name."""
    found = {}
    for group, params in enumerate(optimizer.round_robin_bit16_groups):
        mine = partitions[group].detach()
        parts = [torch.empty_like(mine) for _ in range(worker.WORLD_SIZE)]
        dist.all_gather(parts, mine)
        flat = torch.cat(parts).double()
        for param, offset in zip(params, optimizer.round_robin_bit16_offsets[group], strict=True):
            found[optimizer.param_names[param]] = flat[offset : offset + param.numel()]
    return found


if __name__ == "__main__":
    worker.serve(run)
