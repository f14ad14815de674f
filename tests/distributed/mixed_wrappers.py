"""Worker: a small model in a wrapper or under DeepSpeed, trained on batches that mix languages, against the reference.

The reference is `bucketmoo_ds.reference` on one process in float64, fed with the gradient of every language's documents
alone, each a sequence of its own. Weights are given by hand: a rule whose weights depend on the block alone.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import random
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import toy_models
import worker
from compare_with_reference import blocks_of, loss_scale
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from transformers.pytorch_utils import Conv1D
from wrapped import whole
from wrappers import WRAPPERS, two_dimensional

import bucketmoo_ds
from bucketmoo_ds import reference
from bucketmoo_ds.aggregate import Aggregator
from bucketmoo_ds.aggregate import register as register_rule
from bucketmoo_ds.plan.blocks import plain_name

LANGUAGES = ("de", "fr", "pl")
K = len(LANGUAGES)
VOCABULARY, LENGTH, SEQUENCES = 19, 8, 3
LEARNING_RATE = 1.0  # so that a step shows the gradient
WINDOWS = 2  # the first averages
DTYPES = {"float64": torch.float64, "float32": torch.float32}


@register_rule("by_hand")
@dataclasses.dataclass(frozen=True)
class ByHand(Aggregator):
    """Weights that depend on nothing but the block's number."""

    seed: int = 0

    def weights(self, gram: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """See `Aggregator.weights`."""
        return mask * by_hand(self.seed, len(gram))


def by_hand(seed: int, blocks: int) -> Tensor:
    """`[B, K]` float64, some of them negative."""
    return torch.rand(blocks, K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 1.5 - 0.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One training run.

    Args:
        wrapper: `single`, `ddp`, `fsdp1`, `fsdp2`, or `zero`.
        stage: of ZeRO.
        micro_steps: M.
        expect: whether the window's batches are told ahead.
        packed: whether sequences hold several documents, and languages are given by token.
        before: whether the model is registered before it is wrapped.
        no_sync: whether all micro-steps of a window but the last leave their gradients unreduced.
        init: whether the model is made under `zero.Init`.
        file: whether the JSON is given as a file.
        unused: whether the model has a layer that no forward pass calls.
        checkpoint: see `toy_models.with_checkpoints`.
        autocast: whether the forward pass runs in bf16 under it.
        how: arguments of the wrapper.
        zero: further entries of the JSON's `zero_optimization`.
        top: further entries of the JSON.
        moo: further settings of ours.
        off: whether nobody resolves anything.
        adam: whether the optimizer is Adam.
    """

    seed: int
    wrapper: str
    stage: int = 0
    micro_steps: int = 1
    expect: bool = False
    packed: bool = False
    before: bool = False
    dtype: str = "float64"
    granularity: str = "parameter"
    tied: bool = False
    frozen: bool = False
    no_sync: bool = False
    init: bool = False
    file: bool = False
    unused: bool = False
    checkpoint: str = "none"
    autocast: bool = False
    how: dict[str, Any] = dataclasses.field(default_factory=dict)
    zero: dict[str, Any] = dataclasses.field(default_factory=dict)
    top: dict[str, Any] = dataclasses.field(default_factory=dict)
    moo: dict[str, Any] = dataclasses.field(default_factory=dict)
    off: bool = False
    adam: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        hand = {"aggregator": "by_hand", "aggregator_options": {"seed": self.seed}}
        return {
            "languages": list(LANGUAGES),
            "granularity": self.granularity,
            "gram_every": 1,
            "mode": "mixed",
            "enabled": not self.off,
            **({} if "aggregator" in self.moo else hand),
            **self.moo,
        }

    @property
    def config(self) -> bucketmoo_ds.BucketMOOConfig:
        return bucketmoo_ds.BucketMOOConfig(**self.settings)


class Layer(nn.Module):
    """Attention of one head within documents, and a feed-forward part."""

    def __init__(self, width: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.before = nn.LayerNorm(width, bias=bias)
        self.into = nn.Linear(width, 3 * width, bias=bias)
        self.out = Conv1D(width, width)
        self.between = nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, inner, bias=bias), nn.Linear(inner, width)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.into(self.before(hidden)).chunk(3, -1)
        hidden = hidden + self.out(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))
        return hidden + self.down(functional.gelu(self.up(self.between(hidden))))


class Model(nn.Module):
    """Predicts `labels[..., 1:]`; its loss is the mean over the target tokens."""

    def __init__(self, seed: int, *, tied: bool, frozen: bool, unused: bool) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        width = 2 * draw.randint(3, 8)
        self.embed, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)
        count = draw.randint(1, 2)
        self.layers = nn.ModuleList(Layer(width, draw.randint(5, 30), bias=draw.random() < 0.5) for _ in range(count))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if unused:
            self.spare = nn.Linear(width, width)
        if tied:
            self.head.weight = self.embed.weight
        if frozen:
            self.layers[0].requires_grad_(False)

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> Tensor:
        document = (position_ids == 0).cumsum(-1)
        mask = (document.unsqueeze(-1) == document.unsqueeze(-2)).tril()
        hidden = self.embed(input_ids) + self.places(position_ids)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        logits = self.head(self.norm(hidden))[:, :-1]
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return functional.cross_entropy(wide.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


@dataclasses.dataclass(frozen=True)
class Document:
    """Args: its language, its tokens, and its labels, the first of which nothing predicts."""

    language: int
    ids: Tensor
    labels: Tensor


def documents_of(case: Case, generator: torch.Generator) -> list[list[Document]]:
    """A batch's sequences. Each language is there somewhere."""

    def one(length: int, language: int) -> Document:
        ids = torch.randint(VOCABULARY, (length,), generator=generator)
        labels = torch.where(torch.rand(length, generator=generator) < 0.2, -100, ids)
        labels[0], labels[-1] = -100, ids[-1]
        return Document(language, ids, labels)

    rows = []
    for number in range(SEQUENCES):
        language = int(torch.randint(K, (), generator=generator)) if number else worker.RANK % K
        if not case.packed:
            rows.append([one(LENGTH, language)])
            continue
        cut = int(torch.randint(2, LENGTH - 3, (), generator=generator))
        rest = int(torch.randint(2, LENGTH - cut, (), generator=generator))  # what is left is padding
        rows.append([one(cut, language), one(rest, (language + 1) % K)])
    if worker.WORLD_SIZE < K:  # nobody else brings them
        rows[1] = [dataclasses.replace(each, language=(worker.RANK + 1) % K) for each in rows[1]]
        rows[2] = [dataclasses.replace(each, language=(worker.RANK + 2) % K) for each in rows[2]]
    return rows


def batch_of(case: Case, rows: list[list[Document]]) -> dict[str, Any]:
    """What the model is given. Padding is of no language; each of its tokens is a document."""

    def padded(pieces: list[Tensor], value: int) -> Tensor:
        flat = torch.cat(pieces)
        return functional.pad(flat, (0, LENGTH - len(flat)), value=value)

    batch: dict[str, Any] = {
        "input_ids": torch.stack([padded([each.ids for each in row], 0) for row in rows]),
        "labels": torch.stack([padded([each.labels for each in row], -100) for row in rows]),
        "position_ids": torch.stack([padded([torch.arange(len(each.ids)) for each in row], 0) for row in rows]),
    }
    if case.packed:
        languages = [[torch.full_like(each.ids, each.language) for each in row] for row in rows]
        batch["language"] = torch.stack([padded(each, -1) for each in languages])
    else:
        batch["language"] = [LANGUAGES[row[0].language] for row in rows]
    return batch


def micro_gradients(twin: nn.Module, rows: list[list[Document]], micro_steps: int) -> list[reference.MicroGradient]:
    """Of each language of a batch."""
    found = []
    for language in range(K):
        own = [each for row in rows for each in row if each.language == language]
        targets = [int((each.labels[1:] != -100).sum()) for each in own]
        if not sum(targets):
            continue
        twin.zero_grad()
        for each, count in zip(own, targets, strict=True):
            if count:
                loss = twin(each.ids[None], each.labels[None], torch.arange(len(each.ids))[None])
                (loss * count / sum(targets) / micro_steps).backward()
        gradient = {
            plain_name(name): torch.zeros_like(each) if each.grad is None else each.grad.clone()
            for name, each in twin.named_parameters()
            if each.requires_grad
        }
        found.append(reference.MicroGradient(language, sum(targets), gradient))
    return found


# --- wrappers -------------------------------------------------------------------------------------------------------


class Run:
    """A model that is registered: `module` is the plain one, `model` the one to call."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.module: nn.Module = self.make().to(DTYPES[case.dtype])
        self.twin = copy.deepcopy(self.module).double()
        self.module = toy_models.with_checkpoints(self.module, case.checkpoint)
        self.session: Any = None
        if case.wrapper == "zero":
            self._make_engine()
            return
        first = case.before or case.wrapper == "fsdp1"
        if first and not case.off:
            self.session = self.register(self.module)
        self.model = self._wrap()
        if not first and not case.off:
            self.session = self.register(self.model)
        self.optimizer = self._optimizer(self.model)

    def make(self) -> nn.Module:
        return Model(self.case.seed, tied=self.case.tied, frozen=self.case.frozen, unused=self.case.unused)

    def layers(self) -> nn.ModuleList:
        return self.module.layers

    def register(self, model: nn.Module) -> Any:
        return bucketmoo_ds.mixed.register(model, self.case.config, micro_steps=self.case.micro_steps)

    def _optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        trained = [each for each in module.parameters() if each.requires_grad]
        return torch.optim.Adam(trained, lr=0.01) if self.case.adam else torch.optim.SGD(trained, lr=LEARNING_RATE)

    def _wrap(self) -> Any:
        how, module = dict(self.case.how), self.module
        if self.case.wrapper == "ddp":
            return DistributedDataParallel(module, bucket_cap_mb=2 / 1024, **how)
        if self.case.wrapper == "fsdp1":
            common = {"sharding_strategy": ShardingStrategy.FULL_SHARD, "device_id": torch.device("cpu")} | how
            for index, layer in enumerate(module.layers):
                module.layers[index] = FullyShardedDataParallel(layer, **common)
            return FullyShardedDataParallel(module, **common)
        if self.case.wrapper == "fsdp2":
            if how.pop("bf16", False):
                how["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            if how.pop("replicas", False):
                how["mesh"] = two_dimensional(worker.WORLD_SIZE)
            if how.pop("offload", False):
                how["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
            for layer in self.layers():
                fully_shard(layer, **how)
            return fully_shard(module, **how)
        return module

    def _make_engine(self) -> None:
        case = self.case
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": SEQUENCES,
            "gradient_accumulation_steps": case.micro_steps,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": case.stage, "reduce_bucket_size": 1000, **case.zero},
            "steps_per_print": 10**9,
            "bucket_moo": case.settings,
            **case.top,
        }
        if case.stage == 3:
            config["zero_optimization"].setdefault("stage3_param_persistence_threshold", 40)
        if case.init:
            with deepspeed.zero.Init(config_dict_or_path=config):
                self.module = self.make()
            with deepspeed.zero.GatheredParameters(list(self.module.parameters())):
                for own, made in zip(self.twin.parameters(), self.module.parameters(), strict=True):
                    own.data = made.detach().double().clone()
        optimizer = self._optimizer(self.module)
        path = worker.FOLDER / f"deepspeed{worker.RANK}.json"
        path.write_text(json.dumps(config))
        told = str(path) if case.file else config
        self.model, *_ = bucketmoo_ds.initialize(model=self.module, optimizer=optimizer, config=told)
        self.session = None if case.off else self.model.moo

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        return self.model(**batch)

    def micro_step(self, batch: dict[str, Any], *, last: bool) -> None:
        if self.case.off:
            batch = {name: value for name, value in batch.items() if name != "language"}
        with torch.autocast("cpu", torch.bfloat16, enabled=self.case.autocast):
            loss = self.loss(batch)
        if self.case.wrapper == "zero":
            self.model.backward(loss)
            if not last:
                self.model.step()
            return
        (loss / self.case.micro_steps).backward()

    def reduced(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        if last or not self.case.no_sync:
            return contextlib.nullcontext()
        return WRAPPERS[self.case.wrapper].unreduced(self.model)

    def step(self) -> None:
        if self.case.wrapper == "zero":
            self.model.step()
        else:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def parameters(self) -> dict[str, Tensor]:
        """All of them, float64: every rank calls it."""
        with self._whole():
            found = {name: each.detach() for name, each in self.module.named_parameters()}
            return {plain_name(name): each.double().clone() for name, each in whole(found).items()}

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        if isinstance(self.model, FullyShardedDataParallel):
            with FullyShardedDataParallel.summon_full_params(self.model, writeback=False):
                yield
        else:
            with deepspeed.zero.GatheredParameters(list(self.module.parameters()), enabled=self.case.stage == 3):
                yield

    def gradients(self) -> dict[str, Tensor] | None:
        """After backward, before the step; `None` where nobody shows them."""
        trained = {name: each for name, each in self.module.named_parameters() if each.requires_grad}
        if self.case.wrapper == "zero":
            scale = loss_scale(self.model.optimizer)
            found = {name: deepspeed.utils.safe_get_full_grad(each) / scale for name, each in trained.items()}
        elif self.case.wrapper == "fsdp1":
            if not self.case.how.get("use_orig_params"):
                return None
            with FullyShardedDataParallel.summon_full_params(self.model, with_grads=True):
                found = {name: each.grad.clone() for name, each in self.module.named_parameters() if each.requires_grad}
        else:
            nothing = {name: torch.zeros_like(each) for name, each in trained.items() if each.grad is None}
            found = whole(nothing | {name: each.grad for name, each in trained.items() if each.grad is not None})
        return {plain_name(name): each.double().clone() for name, each in found.items()}


def run(**fields: Any) -> dict[str, Any]:
    """Trains a case.

    Returns:
        the largest errors: `gradient`, of all blocks, relative to the sums of the norms of their weighted rows, against
        the weights by hand; `told`, the same against the weights that the session says it has used; and `weights`, of
        those, absolute.
    """
    case = Case(**fields)
    run = Run(case)
    generator = torch.Generator().manual_seed(100 * case.seed + worker.RANK)
    errors: list[dict[str, float]] = []
    for window in range(WINDOWS):
        steps = [documents_of(case, generator) for _ in range(case.micro_steps)]
        before = run.parameters()
        for name, each in run.twin.named_parameters():
            each.data.copy_(before[plain_name(name)])
        mine = [micro for rows in steps for micro in micro_gradients(run.twin, rows, case.micro_steps)]
        batches = [batch_of(case, rows) for rows in steps]
        if case.expect:
            run.session.expect(batches)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with run.reduced(last=last):
                run.micro_step(batch, last=last)
        found = run.gradients()
        run.step()
        if found is None:
            after = run.parameters()
            found = {name: (before[name] - each) / LEARNING_RATE for name, each in after.items()}
        errors.append(compare(run, window, mine, found))
    return {name: max(each[name] for each in errors) for name in errors[0]}


def compare(run: Run, window: int, mine: list[reference.MicroGradient], found: dict[str, Tensor]) -> dict[str, float]:
    everyone: list[Any] = [None] * worker.WORLD_SIZE
    dist.all_gather_object(everyone, mine)
    micros = [micro for rank in everyone for micro in rank]
    last, blocks = run.session.last, blocks_of(run.session.plan)

    def resolved(weights: Tensor) -> list[Tensor]:
        """The combined gradient of every block, by these weights `[B, K]`."""
        given = iter(weights)
        combined, _ = reference.resolve_window(
            micros, blocks, micro_steps=run.case.micro_steps, aggregator=lambda gram: next(given)
        )
        return [torch.cat([combined[name].flatten() for name in names]) for names in blocks.values()]

    hand = by_hand(run.case.seed, len(blocks)) if window else torch.full((len(blocks), K), 1 / K, dtype=torch.float64)
    rows = [resolved(each.expand(len(blocks), K)) for each in torch.eye(K, dtype=torch.float64)]
    norms = torch.tensor([[float(block.norm()) for block in row] for row in rows]).double().T
    got = [torch.cat([found[name].flatten() for name in names]) for names in blocks.values()]
    errors = {"weights": float((last.weights - hand).abs().max())}
    for name, weights in (("gradient", hand), ("told", last.weights)):
        scales = (norms * weights.abs()).sum(-1)
        apart = torch.stack([(one - other).norm() for one, other in zip(got, resolved(weights), strict=True)])
        errors[name] = float(apart.norm() / scales.norm())
    return errors


if __name__ == "__main__":
    worker.serve(run)
