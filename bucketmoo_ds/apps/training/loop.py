"""The training loop: windows of micro-batches, a line of metrics for each, checkpoints and resume.

All ranks call `train` alike. Position and randomness are functions of the step, so that a resumed run goes on exactly
as an uninterrupted one would have.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import math
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset

from bucketmoo_ds.adapters import table
from bucketmoo_ds.adapters.deepspeed import initialize
from bucketmoo_ds.apps.corpus.evaluate import EvaluationSet, bits_per_byte, nll_sums
from bucketmoo_ds.apps.corpus.packing import IGNORED_LABEL, pad
from bucketmoo_ds.apps.monitor.statistics import conflict_statistics
from bucketmoo_ds.apps.monitor.writer import JsonLinesWriter
from bucketmoo_ds.apps.training.batches import Batches
from bucketmoo_ds.apps.training.environment import TerminatedError
from bucketmoo_ds.apps.training.progress import Progress
from bucketmoo_ds.apps.training.settings import TrainingSettings
from bucketmoo_ds.config import SECTION, BucketMOOConfig
from bucketmoo_ds.data.languages import LanguageTable
from bucketmoo_ds.errors import ConfigError
from bucketmoo_ds.integrations.termination import TerminationRequest, unsaved
from bucketmoo_ds.pipeline import checkpoint

PROGRESS_FILE = "training.json"


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a run ended with: held-out bits per byte by language, and seconds of training (evaluation left out)."""

    bits_per_byte: dict[str, float]
    seconds: float


def train(
    model: torch.nn.Module,
    dataset: Dataset,
    evaluation: Sequence[EvaluationSet],
    settings: TrainingSettings,
    *,
    deepspeed_json: Mapping[str, Any],
    output: Path,
    title: str = "training",
    evaluation_batch: int = 16,
    resume: bool = False,
) -> RunResult:
    """Trains `model` in place.

    Args:
        model: called as `model(input_ids=..., labels=...)`, and with `attention_mask=...` where rows of a micro-batch
            differ in length; returns an object with `.loss`, the mean over targets.
        dataset: columns `input_ids`, `labels`, `language`.
        evaluation: held-out text, measured at the end and every `settings.evaluate_every` steps.
        settings: see `TrainingSettings`.
        deepspeed_json: with a `bucket_moo` section.
        output: folder for `metrics.jsonl` and `checkpoints/`.
        title: for the progress bar.
        resume: whether to go on from the latest checkpoint below `output`.

    Raises:
        ConfigError: nothing to resume from, or a checkpoint of another run.
        TerminatedError: SIGTERM came, and with `settings.save_on_signal` a checkpoint was saved.
    """
    seconds = 0.0
    result: dict[str, float] = {}
    with TerminationRequest(settings.save_on_signal) as termination, ExitStack() as stack:
        loop = _Loop(model, dataset, settings, deepspeed_json, output)
        if resume:
            loop.load()
        writer = loop.open_metrics() if loop.rank == 0 else None
        progress = stack.enter_context(Progress(title, settings.steps, start=loop.step, shown=loop.rank == 0))
        if loop.rank == 0:
            termination.say_what_is_lost(lambda: unsaved(loop.step, loop.saved_step))
        while loop.step < settings.steps:
            began = time.perf_counter()
            record, terminate = loop.window(lambda: termination.asked)
            record["seconds"] = time.perf_counter() - began
            seconds += record["seconds"]
            if writer is not None:
                writer.write(record)
            progress.advance(record)
            last = loop.step == settings.steps
            terminate = terminate and not last
            if evaluation and not terminate and (last or _due(loop.step, settings.evaluate_every)):
                result = loop.evaluate(evaluation, evaluation_batch)
                if writer is not None:
                    writer.write({"event": "eval", "step": loop.step, "bits_per_byte": result})
            if _due(loop.step, settings.checkpoint_every) or (last and settings.checkpoint_at_end) or terminate:
                if writer is not None:
                    writer.flush()
                loop.save()
            if terminate:
                if loop.rank == 0:
                    termination.tell_saved(loop.step, "--resume")
                raise TerminatedError
    if writer is not None:
        writer.write({"event": "end", "step": loop.step, "seconds": seconds, "counters": loop.counters()})
        writer.close()
    loop.engine.destroy()
    return RunResult(result, seconds)


class _Loop:
    """One rank's engine, data and position."""

    def __init__(
        self,
        model: torch.nn.Module,
        dataset: Dataset,
        settings: TrainingSettings,
        deepspeed_json: Mapping[str, Any],
        output: Path,
    ) -> None:
        model.train()  # from_pretrained leaves it in evaluation mode
        section = dict(deepspeed_json[SECTION])
        self.config = BucketMOOConfig(**section)
        self.settings = settings
        self.output = output
        self.step = 0
        self.saved_step: int | None = None
        self.engine, *_ = initialize(
            model=model,
            optimizer=_optimizer(model, settings),
            lr_scheduler=_schedule(settings),
            config=json.loads(json.dumps(deepspeed_json)),
        )
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.data = dataset.with_format("torch", columns=["input_ids", "labels"])
        self.micro_steps = int(self.engine.gradient_accumulation_steps())
        zero = table.find("deepspeed", self.engine.zero_optimization_stage())
        self._batches = Batches(
            dataset,
            self.config,
            settings,
            micro_batch_size=int(self.engine.train_micro_batch_size_per_gpu()),
            micro_steps=self.micro_steps,
            world_size=self.world_size,
            rank=self.rank,
            affinity="window" if zero.exchanged == table.ONCE_A_WINDOW else "micro_step",
        )
        if self.moo is not None and self.config.mode != "mixed":
            self._batches.sampler.follow(self.moo)
        self._table = LanguageTable(self.config.languages)
        self._language_column = dataset.with_format(None)["language"]

    @property
    def moo(self) -> Any:
        """What resolves conflicts, of an engine that does: the pipeline, or the session of mode `mixed`."""
        return getattr(self.engine, "moo", None)

    def window(self, flag: Callable[[], bool]) -> tuple[dict[str, Any], bool]:
        """Trains one window; returns its step record, summed over all ranks, and whether any rank had raised its `flag`
        by the end."""
        self._seed()
        learning_rate = self.engine.get_lr()[0]
        totals = torch.zeros(len(self.config.languages), 2, dtype=torch.float64)
        skipped_before = self.engine.skipped_steps
        for rows in self._batches.window(self.step):
            self._micro_step(rows, totals)
        self.step += 1
        skipped = self.engine.skipped_steps > skipped_before
        *sums, flags = _summed(torch.cat([totals.flatten(), torch.tensor([float(flag())])]), self.engine.device)
        return self._record(torch.stack(sums).view_as(totals), learning_rate, skipped), bool(flags)

    def _micro_step(self, rows: list[int], totals: torch.Tensor) -> None:
        """Trains on a micro-batch, and adds the sum of its token losses and their number to `totals` by language."""
        languages = [self._language_column[row] for row in rows]
        batch = {name: value.to(self.engine.device) for name, value in pad(self.data[rows]).items()}
        told = languages if self.config.mode == "mixed" else languages[0]
        entries = {self.config.language_key: told} if self.moo is not None else {}
        output = self.engine(**batch, **entries)
        loss, logits = output.loss, output.logits.detach() if len(set(languages)) > 1 else None
        del output
        self.engine.backward(loss)
        self.engine.step()
        indices = torch.tensor([self._table.index(language) for language in languages])
        totals.index_add_(0, indices, _loss_sums(loss, logits, batch["labels"]).cpu())

    def evaluate(self, sets: Sequence[EvaluationSet], batch_size: int) -> dict[str, float]:
        """Returns the bits per byte of held-out text, by language."""
        sums = nll_sums(self.engine.module, sets, batch_size, shard=(self.rank, self.world_size))
        return bits_per_byte(_summed(sums, self.engine.device), sets)

    def counters(self) -> dict[str, int]:
        """Returns what has been counted since the run began."""
        counted = dict(self.moo.counters) if self.moo is not None else {}
        return {"skipped_steps": int(self.engine.skipped_steps), **counted}

    def open_metrics(self) -> JsonLinesWriter:
        """Opens the metrics file at this step."""
        writer = JsonLinesWriter(self.output / "metrics.jsonl", resume_from_step=self.step)
        moo = self.moo
        writer.write(
            {
                "event": "run",
                "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                "aggregator": self.config.aggregator if moo is not None else "averaging",
                "granularity": self.config.granularity,
                "languages": list(self.config.languages),
                "world_size": self.world_size,
                "micro_steps": self.micro_steps,
                "mode": self._mode(),
                "blocks": list(moo.plan.blocks) if moo is not None else [],
                "config": {SECTION: self.config.to_json(), "training": dataclasses.asdict(self.settings)},
                "versions": {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers")},
            }
        )
        return writer

    def _mode(self) -> str:
        if self.moo is None or self.config.mode == "mixed":
            return "plain" if self.moo is None else "mixed"
        return "streaming" if self.moo.streaming else "deferred"

    def save(self) -> None:
        """Saves a checkpoint named after the step."""
        folder, tag = self.output / "checkpoints", f"step{self.step}"
        if self.rank == 0:
            (folder / tag).mkdir(parents=True, exist_ok=True)
            content = {"step": self.step, "sampler": self._batches.sampler.state_dict()}
            checkpoint.write_atomically(folder / tag / PROGRESS_FILE, json.dumps(content))
        self.engine.save_checkpoint(str(folder), tag)
        self.saved_step = self.step

    def load(self) -> None:
        """Goes on from the latest checkpoint.

        Raises:
            ConfigError: there is none, or it is not of this run.
        """
        folder = self.output / "checkpoints"
        path, _ = self.engine.load_checkpoint(str(folder))
        if path is None:
            raise ConfigError(f"{folder}: no checkpoint to resume from; start without --resume")
        progress = Path(path).parent / PROGRESS_FILE
        try:
            content = json.loads(progress.read_text(encoding="utf-8"))
            self.step = int(content["step"])
            self.saved_step = self.step
            self._batches.load_state_dict(content["sampler"])
        except (OSError, KeyError, ValueError) as error:
            raise ConfigError(f"{progress}: cannot resume from it: {error}") from error

    def _seed(self) -> None:
        """Dropout depends on (seed, step, rank), not on what ran before."""
        digest = hashlib.blake2b(struct.pack("<qqq", self.settings.seed, self.step, self.rank), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))

    def _record(self, totals: torch.Tensor, learning_rate: float, skipped: bool) -> dict[str, Any]:
        names = self.config.languages
        tokens = {name: int(totals[index, 1]) for index, name in enumerate(names)}
        losses = {name: float(totals[index, 0] / totals[index, 1]) for index, name in enumerate(names) if tokens[name]}
        norm = self.engine.get_global_grad_norm()
        record: dict[str, Any] = {
            "event": "step",
            "step": self.step,
            "loss": float(totals[:, 0].sum() / totals[:, 1].sum()),
            "learning_rate": learning_rate,
            "grad_norm": float(norm) if norm is not None and math.isfinite(norm) else None,
            "tokens": sum(tokens.values()),
            "skipped": skipped,
            "nonfinite": [],
            "language_loss": losses,
            "language_tokens": tokens,
        }
        if self.moo is not None and self.moo.last is not None:
            last = self.moo.last
            record["nonfinite"] = [list(pair) for pair in last.nonfinite]
            record["fresh"] = last.fresh
            if not last.nonfinite and (last.fresh or self.config.mode == "mixed"):
                record |= conflict_statistics(last.gram, last.mask, last.weights).detail(names)
        return record


@torch.no_grad()
def _loss_sums(loss: torch.Tensor, logits: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
    """The sum of each sequence's token losses and how many they are, `[batch, 2]` float64. Without logits each gets its
    share of the whole: of a micro-batch of one language nobody asks for more."""
    targets = labels[:, 1:].long()
    counts = (targets != IGNORED_LABEL).sum(1, dtype=torch.float64)
    if logits is None:
        return torch.stack([loss.double() * counts, counts], 1)
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED_LABEL, reduction="none"
    )
    return torch.stack([losses.sum(1, dtype=torch.float64), counts], 1)


def _optimizer(model: torch.nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    present = [group for group in groups if group["params"]]
    return torch.optim.AdamW(present, lr=settings.learning_rate, betas=settings.betas)


def _schedule(settings: TrainingSettings) -> Callable[[torch.optim.Optimizer], Any]:
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, settings.learning_rate_share)


def _summed(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    moved = values.to(device)
    dist.all_reduce(moved)
    return moved.cpu()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
