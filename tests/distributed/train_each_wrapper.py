"""Worker: 20 optimizer steps from the same weights and data under one wrapper of `bucketmoo_ds.adapters.table`.

Under a wrapper every rank takes its own slots of a window; one process takes them all, one after the other. The
reference is one process too: everything in float64, resolved by `bucketmoo_ds.reference`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import worker
from compare_with_reference import blocks_of
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import GPT2Config, GPT2LMHeadModel

import bucketmoo_ds
from bucketmoo_ds import reference
from bucketmoo_ds.adapters import table
from bucketmoo_ds.plan.blocks import Parameter, plan_blocks
from bucketmoo_ds.plan.choices import create_aggregator

STEPS = 20
LEARNING_RATE = 0.1
LANGUAGES = ("de", "fr", "ko")
VOCABULARY, SEQUENCES, LENGTH = 61, 2, 15


class Batch(NamedTuple):
    language: int
    ids: Tensor
    labels: Tensor

    @property
    def target_tokens(self) -> int:
        return int((self.labels[:, 1:] != -100).sum())

    def loss(self, logits: Tensor) -> Tensor:
        """The mean over the target tokens, in the logits' dtype; transformers would compute it in float32."""
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), self.labels[:, 1:].flatten())


def run(*, wrapper: str, granularity: str, slots: int, gram_every: int, seed: int) -> dict[str, Any]:
    """Trains.

    Args:
        wrapper: a name of the table, or `reference`.
        slots: micro-batches of a window, over all ranks.
        gram_every: see `BucketMOOConfig`.

    Returns:
        the parameters by name, whole, before and after training; of all windows the Grams `[STEPS, B, K, K]` and the
        weights `[STEPS, B, K]`; and the median of the steps' milliseconds.
    """
    torch.manual_seed(seed)
    model = make_model()
    before = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    config = bucketmoo_ds.BucketMOOConfig(languages=LANGUAGES, granularity=granularity, gram_every=gram_every)
    kind = {"deepspeed": UnderDeepSpeed, "reference": InFloat64}.get(wrapper, UnderTorch)
    training = kind(wrapper, model, config, slots // worker.WORLD_SIZE)
    decided: list[Decided] = []
    seconds = []
    for window in range(STEPS):
        mine = [micro_batch(seed, window, slot) for slot in range(worker.RANK, slots, worker.WORLD_SIZE)]
        began = time.perf_counter()
        decided.append(training.window(mine))
        seconds.append(time.perf_counter() - began)
    after = training.parameters()
    return {
        "before": before,
        "after": {name: after[name].detach().double() for name in before},
        "gram": torch.stack([each.gram for each in decided]),
        "weights": torch.stack([each.weights for each in decided]),
        "milliseconds": 1e3 * statistics.median(seconds),
    }


class Decided(NamedTuple):
    """The Grams `[B, K, K]` and weights `[B, K]` of a window."""

    gram: Tensor
    weights: Tensor


def make_model() -> nn.Module:
    """Odd sizes, a tied head and, in its layers, matrices and vectors; all of it computes in its parameters' dtype."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=LENGTH,
            n_embd=18,
            n_head=2,
            n_layer=3,
            bos_token_id=0,
            eos_token_id=0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
        )
    )


def micro_batch(seed: int, window: int, slot: int) -> Batch:
    """Of a language that has its own transition of tokens, with a random part of the targets masked."""
    generator = torch.Generator().manual_seed((seed * STEPS + window) * 100 + slot)
    language = (window + slot) % len(LANGUAGES)
    start = torch.randint(VOCABULARY, (SEQUENCES, 1), generator=generator)
    noise = torch.randint(3, (SEQUENCES, LENGTH), generator=generator)
    ids = (start + (3 * language + 1) * torch.arange(LENGTH) + noise) % VOCABULARY
    labels = ids.clone()
    labels[0, int(torch.randint(4, LENGTH, (), generator=generator)) :] = -100
    return Batch(language, ids, labels)


class UnderTorch:
    """One of torch's wrappers, or one process, with SGD."""

    def __init__(self, wrapper: str, model: nn.Module, config: Any, micro_steps: int) -> None:
        framework = table.find(wrapper)
        assert framework.wrap is not None
        self.model = framework.wrap(model, model.transformer.h, torch.float32, 25 * 2**20)
        self.session = framework.load().register(self.model, config, micro_steps=micro_steps)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)

    def window(self, batches: Sequence[Batch]) -> Decided:
        for batch in batches:
            with self.session.language(batch.language, batch.target_tokens):
                logits = self.model(batch.ids).logits
            (batch.loss(logits) / len(batches)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Decided(self.session.last.gram, self.session.last.weights)

    def parameters(self) -> dict[str, Tensor]:
        return get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True))


class UnderDeepSpeed:
    """ZeRO-2 with SGD."""

    def __init__(self, wrapper: str, model: nn.Module, config: Any, micro_steps: int) -> None:
        self.engine, *_ = bucketmoo_ds.initialize(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
            config={
                "train_micro_batch_size_per_gpu": SEQUENCES,
                "gradient_accumulation_steps": micro_steps,
                "zero_optimization": {"stage": 2, "reduce_bucket_size": 3000},
                "gradient_clipping": 0.0,  # 1.0 if nothing is said
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 10**9,
                "bucket_moo": config.to_json(),
            },
        )

    def window(self, batches: Sequence[Batch]) -> Decided:
        for batch in batches:
            with self.engine.language(batch.language, batch.target_tokens):
                logits = self.engine(batch.ids).logits
            self.engine.backward(batch.loss(logits))
            self.engine.step()
        return Decided(self.engine.moo.last.gram, self.engine.moo.last.weights)

    def parameters(self) -> dict[str, Tensor]:
        return self.engine.module.state_dict()


class InFloat64:
    """The reference."""

    def __init__(self, wrapper: str, model: nn.Module, config: Any, micro_steps: int) -> None:
        self.model = model.double()
        self.aggregator = create_aggregator(config)
        sizes = [Parameter(name, each.numel()) for name, each in model.named_parameters()]
        self.blocks = blocks_of(plan_blocks(sizes, 10**9, config.granularity))
        self.every, self.windows = config.gram_every, 0
        self.solved: dict[str, Tensor] = {}

    def window(self, batches: Sequence[Batch]) -> Decided:
        micro_gradients = []
        for batch in batches:
            (batch.loss(self.model(batch.ids).logits) / len(batches)).backward()
            gradient = {name: each.grad for name, each in self.model.named_parameters()}
            micro_gradients.append(reference.MicroGradient(batch.language, batch.target_tokens, gradient))
            self.model.zero_grad()
        combined, weights = {}, {}
        for block, names in self.blocks.items():
            solves = self.windows % self.every == 0  # else the same languages are there
            rule = self.aggregator if solves else lambda gram, block=block: self.solved[block]
            found = reference.resolve_window(micro_gradients, {block: names}, micro_steps=len(batches), aggregator=rule)
            combined, weights = combined | found[0], weights | found[1]
        self.windows, self.solved = self.windows + 1, weights
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.sub_(combined[name], alpha=LEARNING_RATE)
        whole = torch.zeros(len(self.blocks), len(LANGUAGES), dtype=torch.float64)
        whole[:, sorted({batch.language for batch in batches})] = torch.stack(list(weights.values()))
        return Decided(torch.zeros(*whole.shape, len(LANGUAGES)), whole)

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())


if __name__ == "__main__":
    worker.serve(run)
