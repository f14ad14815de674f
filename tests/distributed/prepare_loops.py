"""Worker: a plain loop of Accelerate's with `bm.prepare`, against the same window by hand in float64.

On a CPU Accelerate shards nothing: here its state is told that it does, and the rest of its FSDP2 runs as it is.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import toy
import worker
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from setup_engine import LANGUAGES, settings
from torch.utils.data import DataLoader

import bucketmoo_ds as bm
from bucketmoo_ds import aggregate
from bucketmoo_ds.errors import BucketMOOError
from bucketmoo_ds.plan.choices import create_aggregator
from bucketmoo_ds.reference import MicroGradient, resolve_window

LEARNING_RATE = 0.5
SAMPLES, BATCH = 48, 2


class Loop:
    """A prepared run, of a fresh model that is the same on all ranks."""

    def __init__(
        self, wrapper: str, micro_steps: int, mode: str, seed: int, *, samples: int = SAMPLES, ragged: bool = True,
        **moo: Any,
    ) -> None:  # fmt: skip
        self._begin(wrapper, micro_steps, seed)
        self.config = bm.BucketMOOConfig(languages=LANGUAGES, granularity="model", mode=mode, **moo)
        self.micro_steps = micro_steps
        self.rows = rows(seed, samples, ragged)
        optimizer = torch.optim.SGD(self.module.parameters(), lr=LEARNING_RATE)
        self.sampler = bm.LanguageBatchSampler(
            self.rows, self.config, micro_batch_size=BATCH, micro_steps=micro_steps, world_size=worker.WORLD_SIZE
        )
        how = {"batch_size": BATCH, "drop_last": True} if mode == "mixed" else {"batch_sampler": self.sampler}
        self.model, self.optimizer, self.loader, self.session = bm.prepare(
            self.accelerator, self.module, optimizer, DataLoader(self.rows, **how), config=self.config
        )

    def _begin(self, wrapper: str, micro_steps: int, seed: int) -> None:
        for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
            os.environ.pop(name, None)
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        torch.manual_seed(seed)
        self.module = toy.ToyLM()
        self.accelerator = accelerator(wrapper, micro_steps)

    def train_epoch(self) -> int:
        """Returns how many micro-steps it has."""
        steps = 0
        for batch in self.loader:
            steps += 1
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(**batch))
                self.optimizer.step()
                self.optimizer.zero_grad()
        return steps

    def train(self, windows: int) -> None:
        """Until so many windows are resolved."""
        for batch in self.loader:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(**batch))
                self.optimizer.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients and self.session.windows == windows:
                return
        raise AssertionError("the epoch has too few windows")

    def parameters(self) -> list[torch.Tensor]:
        whole = [getattr(each, "full_tensor", lambda each=each: each)() for each in self.model.parameters()]
        if hasattr(self.model, "zero_optimization_stage"):
            whole = worker.weights(self.model.module)
        return [each.detach().double().clone() for each in whole]


class PlainLoop(Loop):
    """The same over mixed batches without us."""

    def __init__(self, wrapper: str, micro_steps: int, seed: int, samples: int) -> None:
        self._begin(wrapper, micro_steps, seed)
        data = [{name: each for name, each in row.items() if name != "language"} for row in rows(seed, samples, False)]
        optimizer = torch.optim.SGD(self.module.parameters(), lr=LEARNING_RATE)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(
            self.module, optimizer, DataLoader(data, batch_size=BATCH, drop_last=True)
        )


def rows(seed: int, samples: int = SAMPLES, ragged: bool = True) -> list[dict[str, Any]]:
    """Samples of all languages by turns, with different numbers of targets, or with equal ones."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(samples):
        language = index % len(LANGUAGES)
        batch = toy.micro_batch(language, generator, ragged=ragged)
        found.append({"language": LANGUAGES[language]} | {name: value[0] for name, value in batch.items()})
    return found


def accelerator(wrapper: str, micro_steps: int) -> Accelerator:
    gloo = [InitProcessGroupKwargs(backend="gloo")]
    if wrapper.startswith("zero"):
        json = settings(int(wrapper[-1]), micro_steps=micro_steps, gradient_clipping=0.0)
        json["train_micro_batch_size_per_gpu"] = "auto"
        return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=json), kwargs_handlers=gloo)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2) if wrapper == "fsdp2" else None
    made = Accelerator(
        cpu=True, gradient_accumulation_steps=micro_steps, fsdp_plugin=plugin, kwargs_handlers=gloo
    )
    if plugin is not None:
        made.state.fsdp_plugin = plugin
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
    return made


def expected(loop: Loop, mode: str, seed: int) -> list[torch.Tensor]:
    """The parameters after the first window, whose micro-batches are those of all ranks."""
    torch.manual_seed(seed)
    module = toy.ToyLM().double()
    slots = loop.micro_steps * worker.WORLD_SIZE
    if mode == "mixed":  # a micro-batch of each language's rows, of all ranks: its first window averages
        seen = range(slots * BATCH)
        batches = [[row for row in seen if row % len(LANGUAGES) == k] for k in range(min(len(seen), len(LANGUAGES)))]
        rule = aggregate.create("mean")
    else:
        batches = [batch for batch, _ in zip(loop.sampler, range(slots), strict=False)]
        rule = create_aggregator(loop.config)
    micro_gradients = []
    for batch in batches:
        tensors = {name: torch.stack([loop.rows[i][name] for i in batch]) for name in ("input_ids", "labels")}
        module.zero_grad()
        logits = module.logits(tensors["input_ids"])
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tensors["labels"][:, 1:].flatten())
        (loss / loop.micro_steps).backward()
        gradient = {name: each.grad.clone() for name, each in module.named_parameters()}
        language = LANGUAGES.index(loop.rows[batch[0]]["language"])
        micro_gradients.append(MicroGradient(language, toy.tokens_of(tensors), gradient))
    names = [name for name, _ in module.named_parameters()]
    combined, _ = resolve_window(
        micro_gradients, {"model": names}, micro_steps=loop.micro_steps, aggregator=rule
    )
    return [each.detach() - LEARNING_RATE * combined[name] for name, each in module.named_parameters()]


def short_window(wrapper: str, seed: int) -> dict[str, Any]:
    """Returns how far an epoch whose last window is one micro-step short is from plain Accelerate's, relative to what
    both moved; and what comes of a forward pass through the module inside."""
    samples = 11 * BATCH * worker.WORLD_SIZE  # 5 windows and a half
    plain = PlainLoop(wrapper, 2, seed, samples)
    before = plain.parameters()
    assert plain.train_epoch() == 11
    wanted = plain.parameters()
    loop = Loop(wrapper, 2, "mixed", seed, samples=samples, ragged=False, aggregator="mean", weighting="token")
    assert loop.train_epoch() == 11
    off = torch.cat([(a - w).flatten() for a, w in zip(loop.parameters(), wanted, strict=True)]).norm()
    step = torch.cat([(b - w).flatten() for b, w in zip(before, wanted, strict=True)]).norm()
    found = {"off": float(off / step), "wrapper": type(loop.model).__name__, "windows": loop.session.windows}
    inner = loop.accelerator.unwrap_model(loop.model)
    if inner is not loop.model and not hasattr(loop.model, "zero_optimization_stage"):
        batch = {name: each for name, each in next(iter(loop.loader)).items() if name != "language"}
        try:
            loop.accelerator.backward(inner(**batch))
        except BucketMOOError as error:
            found["inside"] = str(error)
        else:
            found["inside"] = "silent"
    return found


def run(*, wrapper: str, micro_steps: int, mode: str, seed: int) -> dict[str, Any]:
    """Returns how far the first window's step is from the one by hand, relative to the step; and whether a run that was
    saved after two windows and went on ends with the bits of the one that was not interrupted."""
    if mode == "mixed" and micro_steps > 1:
        return short_window(wrapper, seed)
    loop = Loop(wrapper, micro_steps, mode, seed)
    wanted = expected(loop, mode, seed)
    loop.sampler.seek(0)
    before = loop.parameters()
    loop.train(1)
    after = loop.parameters()
    off = torch.cat([(a - w).flatten() for a, w in zip(after, wanted, strict=True)]).norm()
    step = torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)]).norm()
    if mode == "mixed":  # whose loader is the user's to move
        return {"off": float(off / step), "wrapper": type(loop.model).__name__}
    with tempfile.TemporaryDirectory() as folder:
        folders = [folder]
        dist.broadcast_object_list(folders)
        loop = Loop(wrapper, micro_steps, mode, seed)
        loop.train(2)
        loop.accelerator.save_state(folders[0])
        loop.sampler.seek(0, 2)
        loop.train(4)
        whole, state = loop.parameters(), loop.session.state_dict()
        other = Loop(wrapper, micro_steps, mode, seed + 1)
        other.rows[:] = loop.rows
        other.accelerator.load_state(folders[0])
        other.train(4)
        dist.barrier()
    same = all(torch.equal(a, b) for a, b in zip(whole, other.parameters(), strict=True))
    return {
        "off": float(off / step),
        "wrapper": type(loop.model).__name__,
        "same": same and state == other.session.state_dict(),
    }



if __name__ == "__main__":
    worker.serve(run)
