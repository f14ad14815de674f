"""Worker: trains windows with bucket_moo and compares gradients, weights, norms and updates with the reference.

The reference is `bucketmoo_ds.reference`: one process, float64, fed with the gradients that autograd gave every rank.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import operator
import struct
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import toy
import toy_models
import worker
from halves_by_rule import halves_by_rule
from torch import Tensor

import bucketmoo_ds
from bucketmoo_ds import reference
from bucketmoo_ds.pipeline import engine as pipeline
from bucketmoo_ds.plan.blocks import plain_name
from bucketmoo_ds.plan.choices import create_aggregator

LEARNING_RATE = 0.05
WEIGHT_DECAYS = (0.1, 0.0)
WINDOWS = 2
pipeline.TOGETHER = 1000  # elements: some of the toy model's buckets wait for each other, others do not

MODELS: dict[str, Callable[..., toy.ToyLM]] = {
    "toy": toy.ToyLM,
    "lora": toy_models.LoRA,
    "sparse": toy_models.Sparse,
    "muon": toy_models.ForMuon,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One training run; the fields are DeepSpeed's and our settings, the toy model's and the data's.

    Args:
        affinity: whether a rank keeps its language for a `window` or a `micro_step`; left out, what the stage asks for.
        by_node: whether ranks 2 n and 2 n + 1 train on one language.
        used_adapters: which of the model's `adapters` each rank's forward passes use.
        model: a key of `MODELS`.
        checkpoint: see `toy_models.with_checkpoints`.
        forwards: forward passes before a backward, whose loss is the mean over all their target tokens.
        alike: whether all micro-batches of a language hold the same sequences, in all windows: no noise is in them.
        no_sync: whether all micro-steps but the last run as under `Accelerator.accumulate`.
        cpu_adam: DeepSpeed's own Adam for offload; updates are then not compared.
        zero: entries of the JSON's `zero_optimization`.
        top: other entries of the JSON.
        moo: other entries of its `bucket_moo`.
    """

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
    preferred: bool = False
    ragged: bool = True
    empty: bool = False
    tied: bool = False
    frozen: bool = False
    adapters: int = 0
    small: bool = False
    autocast: bool = False
    offload: bool = False
    offload_params: bool = False
    model: str = "toy"
    affinity: str = ""
    by_node: bool = False
    used_adapters: list[int] | None = None
    checkpoint: str = "none"
    forwards: int = 1
    alike: bool = False
    no_sync: bool = False
    cpu_adam: bool = False
    zero: dict[str, Any] = dataclasses.field(default_factory=dict)
    top: dict[str, Any] = dataclasses.field(default_factory=dict)
    moo: dict[str, Any] = dataclasses.field(default_factory=dict)

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
                "preference": [1.0 + self.preferred * (index % 3) for index in range(self.languages)],
                "seed": self.seed,
                "mode": mode,
                **self.moo,
            },
            **self.top,
        }
        if self.dtype != "fp32":
            config[self.dtype] = {"enabled": True}
        if self.dtype == "fp16":
            config["fp16"] |= {"initial_scale_power": 8, "loss_scale_window": 1000}
        if self.autocast:
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        if self.offload:
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
            config["zero_force_ds_cpu_optimizer"] = False
        if self.offload_params:
            config["zero_optimization"]["offload_param"] = {"device": "cpu"}
        if self.stage == 3:
            # The default would keep all of the toy model whole; so some parameters are gathered, and some kept.
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 100
        config["zero_optimization"] |= self.zero
        if self.accumulate:
            config["data_types"] = {"grad_accum_dtype": self.accumulate}
        return config

    def table(self, window: int) -> list[list[int]]:
        """The languages of the slots, [M][W]: as many different ones as there are slots, in random places. A rank keeps
        its language on ZeRO-1."""
        generator = torch.Generator().manual_seed(self.seed + window)
        keeps = self.stage == 1 if not self.affinity else self.affinity == "window"
        rows = 1 if keeps else self.micro_steps
        if self.by_node:
            places = range(rows * worker.WORLD_SIZE // 2)
            pairs = [2 * [(window + place) % self.languages] for place in places]
            flat = [language for pair in pairs for language in pair]
            return [flat[at : at + worker.WORLD_SIZE] for at in range(0, len(flat), worker.WORLD_SIZE)]
        slots = [(2 * window + slot) % self.languages for slot in range(rows * worker.WORLD_SIZE)]
        places = torch.randperm(len(slots), generator=generator).tolist()
        table = [
            [slots[place] for place in places[start : start + worker.WORLD_SIZE]]
            for start in range(0, len(slots), worker.WORLD_SIZE)
        ]
        return table * (self.micro_steps // rows)

    def batches(self, language: int, generator: torch.Generator, *, empty: bool) -> list[dict[str, Any]]:
        """What the forward passes of a micro-step are given."""
        if self.alike:
            generator = torch.Generator().manual_seed(self.seed + language)
        extra = {"adapter": self.used_adapters[worker.RANK]} if self.used_adapters else {}
        return [
            toy.micro_batch(language, generator, ragged=self.ragged, empty=empty) | extra for _ in range(self.forwards)
        ]

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
    model = MODELS[case.model](tied=case.tied, frozen=case.frozen, adapters=case.adapters, small=case.small)
    model = toy_models.with_checkpoints(model, case.checkpoint)
    twin = copy.deepcopy(model)
    engine = make_engine(case, mode, model)
    twin = twin.to(dtype=next(engine.module.parameters()).dtype)
    generator = torch.Generator().manual_seed(case.seed * 100 + worker.RANK)
    errors: list[dict[str, float]] = []
    for window in range(WINDOWS):
        if compare:
            load_whole(twin, engine.module)
        micro_gradients = []
        for step, row in enumerate(case.table(window)):
            language = row[worker.RANK]
            batches = case.batches(language, generator, empty=case.empty_slot() == (step, worker.RANK))
            if compare:
                scale = loss_scale(engine.optimizer)
                with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
                    micro_gradients.append(own_gradient(twin, joined(batches), language, case.micro_steps, scale))
            micro_step(case, engine, batches, f"l{language}", last=step == case.micro_steps - 1)
        if not compare:
            engine.step()
            continue
        before, gradient, scale = parameters(engine), gradients(engine), loss_scale(engine.optimizer)
        engine.step()
        found = {
            "before": before,
            "gradient": {name: value / scale for name, value in gradient.items()},
            "after": parameters(engine),
        }
        errors.append(compare_window(case, engine, window=window, micro_gradients=micro_gradients, **found))
    worst = {name: max(error[name] for error in errors) for name in errors[0]} if compare else {}
    return worst | {"parameters": worker.checksum(worker.weights(engine.module)), "streaming": engine.moo.streaming}


def micro_step(case: Case, engine: Any, batches: list[dict[str, Any]], language: str, *, last: bool) -> None:
    if case.no_sync:
        engine.set_gradient_accumulation_boundary(last)
    with engine.no_sync() if case.no_sync and not last else contextlib.nullcontext():
        losses = [engine(**batch, language=language) for batch in batches]
        tokens = [toy.tokens_of(batch) for batch in batches]
        whole = losses[0] if len(losses) == 1 else sum(map(operator.mul, losses, tokens)) / sum(tokens)
        engine.backward(whole)
    if not last and not case.no_sync:
        engine.step()


def joined(batches: list[dict[str, Any]]) -> dict[str, Any]:
    return (
        batches[0] if len(batches) == 1 else {name: torch.cat([each[name] for each in batches]) for name in batches[0]}
    )


def load_whole(twin: torch.nn.Module, module: torch.nn.Module) -> None:
    with torch.no_grad():
        for own, theirs in zip(twin.parameters(), worker.weights(module), strict=True):
            own.copy_(theirs)


def make_engine(case: Case, mode: str, model: torch.nn.Module) -> Any:
    params: list[Any] = [p for p in model.parameters() if p.requires_grad]
    if case.groups:
        params = [{"params": params[index::2], "weight_decay": WEIGHT_DECAYS[index]} for index in (0, 1)]
    make = deepspeed.ops.adam.DeepSpeedCPUAdam if case.cpu_adam else torch.optim.SGD
    optimizer = make(params, lr=LEARNING_RATE)
    engine, *_ = bucketmoo_ds.initialize(model=model, optimizer=optimizer, config=case.settings(mode))
    return engine


def own_gradient(
    twin: torch.nn.Module, batch: dict[str, Tensor], language: int, micro_steps: int, scale: float
) -> reference.MicroGradient:
    """The gradient that DeepSpeed is handed for this micro-batch, before anything is reduced, without the loss scale,
    a power of two."""
    twin.zero_grad()
    loss = twin(**batch)
    (loss * scale / micro_steps).backward()
    gradient = {
        plain_name(name): (torch.zeros_like(p) if p.grad is None else p.grad.clone()).double() / scale
        for name, p in twin.named_parameters()
        if p.requires_grad
    }
    return reference.MicroGradient(language, toy.tokens_of(batch), gradient, float(loss.detach()))


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
    * `relative`: the same, relative to the norm of the combined gradient, where that is not 0 (opposite rows of a block
      of one element cancel).
    * `weights`: of a block's weights, absolute.
    * `norm`: of the global norm that DeepSpeed clips by, relative.
    * `update`: of the float32 parameters after the step (SGD, clipped), relative to the norms of the parameter and of
      the step: where these nearly cancel, what is left is much smaller.
    """
    everyone: list[Any] = [None] * worker.WORLD_SIZE
    dist.all_gather_object(everyone, micro_gradients)
    micros = with_halves(case, everyone)
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
        preference=engine.moo.config.preferred(range(case.languages)),
        gram=engine.moo.config.gram,
        seed=random_order_seed(case.seed, window),
    )
    errors = {"gradient": 0.0, "relative": 0.0, "weights": 0.0, "norm": 0.0}
    for number, (block, names) in enumerate(blocks.items()):
        found = torch.cat([gradient[name].flatten() for name in names])
        wanted = torch.cat([expected[name].flatten() for name in names])
        difference = float((found - wanted).norm())
        diagonal = last.gram[number].diagonal()[list(last.present)]
        scale = float((weights[block].abs() * diagonal.sqrt()).sum())
        ours = last.weights[number, list(last.present)]
        errors["gradient"] = max(errors["gradient"], ratio(difference, scale))
        if wanted.any():
            errors["relative"] = max(errors["relative"], ratio(difference, float(wanted.norm())))
        errors["weights"] = max(errors["weights"], float((ours - weights[block]).abs().max()))
    norm = float(torch.cat([value.flatten() for value in expected.values()]).norm())
    known = engine.get_global_grad_norm()
    if known is not None:  # ZeRO-0 in float32 computes none
        errors["norm"] = ratio(abs(float(known) - norm), norm)
    if not case.cpu_adam:
        errors["update"] = update_error(case, engine, before=before, expected=expected, after=after, norm=norm)
    return errors


def with_halves(case: Case, ranks: list[list[reference.MicroGradient]]) -> list[reference.MicroGradient]:
    """The micro-batches of all ranks with their halves, which say nothing where Grams are plain."""
    steps = list(zip(*ranks, strict=True))
    slots = [[(micro.language, micro.target_tokens) for micro in step] for step in steps]
    halves = halves_by_rule(slots, sticks=case.stage < 2, apart=True)
    return [
        dataclasses.replace(micro, half=half)
        for step, of_step in zip(steps, halves, strict=True)
        for micro, half in zip(step, of_step, strict=True)
    ]


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
    names = {param: plain_name(name) for name, param in engine.module.named_parameters()}
    for decay, params in zip(decays, user_groups(engine.optimizer), strict=True):
        for name in (names[param] for param in params):
            step = LEARNING_RATE * (expected[name].flatten() / divisor + decay * before[name])
            error = (after[name] - (before[name] - step)).norm()
            worst = max(worst, ratio(float(error), float(before[name].norm() + step.norm())))
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


def loss_scale(optimizer: Any) -> float:
    """What losses are multiplied by; the user's own optimizer (ZeRO-0) knows none."""
    return float(getattr(optimizer, "loss_scale", 1.0))


def user_groups(optimizer: Any) -> list[list[Tensor]]:
    """The parameters of the user's groups."""
    if hasattr(optimizer, "round_robin_bit16_groups"):
        return optimizer.round_robin_bit16_groups
    if not hasattr(optimizer, "sub_group_to_group_id"):
        return getattr(optimizer, "fp16_groups", None) or [group["params"] for group in optimizer.param_groups]
    groups: dict[float, list[Tensor]] = {}
    for number, params in enumerate(optimizer.fp16_groups):  # ZeRO-3 cuts groups into sub-groups
        decay = optimizer.optimizer.param_groups[optimizer.sub_group_to_group_id[number]]["weight_decay"]
        groups.setdefault(decay, []).extend(params)
    return list(groups.values())


def parameters(engine: Any) -> dict[str, Tensor]:
    """All float32 parameters, by name, float64."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "round_robin_bit16_groups"):
        return whole(optimizer, optimizer.single_partition_of_fp32_groups)
    if hasattr(optimizer, "sub_group_to_group_id"):
        return chunks(optimizer, optimizer.get_local_fp32_param)
    names = {param: plain_name(name) for name, param in engine.module.named_parameters()}
    kept = getattr(optimizer, "fp32_groups", None) or user_groups(optimizer)
    groups = zip(user_groups(optimizer), kept, strict=True)
    pairs = ((names[p], q) for ps, qs in groups for p, q in zip(ps, qs, strict=True))
    return {name: param.detach().double().flatten() for name, param in pairs}


def gradients(engine: Any) -> dict[str, Tensor]:
    """The gradients that the optimizer is about to use, by name, float64."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "round_robin_bit16_groups"):
        groups = range(len(optimizer.bit16_groups))
        if optimizer.cpu_offload:
            return whole(optimizer, [optimizer.single_partition_of_fp32_groups[group].grad for group in groups])
        pieces = [optimizer.averaged_gradients[group] for group in groups]
        return whole(optimizer, [torch.cat([piece.flatten() for piece in group]) for group in pieces])
    if hasattr(optimizer, "sub_group_to_group_id"):
        return chunks(optimizer, optimizer.get_local_fp32_grad_for_param)
    trained = {plain_name(name): param for name, param in engine.module.named_parameters() if param.requires_grad}
    return {name: param.grad.double().flatten() for name, param in trained.items()}


def chunks(optimizer: Any, read: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Puts the chunks of ZeRO-3's parameters together."""
    params = [param for group in optimizer.fp16_groups for param in group if param.requires_grad]
    chunks = [read(param).detach().double().flatten().cpu() for param in params]
    sizes = [param.partition_numel() for param in params]
    mine = torch.cat([torch.nn.functional.pad(c, (0, size - len(c))) for c, size in zip(chunks, sizes, strict=True)])
    ranks = mine.new_empty(worker.WORLD_SIZE * len(mine))
    dist.all_gather_into_tensor(ranks, mine)
    columns = ranks.view(worker.WORLD_SIZE, -1).split(sizes, dim=1)
    return {
        plain_name(optimizer.param_names[param]): column.flatten()[: param.ds_numel]
        for param, column in zip(params, columns, strict=True)
    }


def whole(optimizer: Any, partitions: list[Tensor]) -> dict[str, Tensor]:
    """Puts flat partitions of all ranks together; returns float64 by parameter name."""
    found = {}
    for group, params in enumerate(optimizer.round_robin_bit16_groups):
        mine = partitions[group].detach()
        parts = [torch.empty_like(mine) for _ in range(worker.WORLD_SIZE)]
        dist.all_gather(parts, mine)
        flat = torch.cat(parts).double()
        end = 0
        for param in params:  # without parameter_alignment nothing lies between two of them
            begin, end = end, end + param.numel()
            found[plain_name(optimizer.param_names[param])] = flat[begin:end]
    return found


if __name__ == "__main__":
    worker.serve(run)
