"""`LanguageTrainerMixin`: transformers' Trainer and Seq2SeqTrainer, TRL's SFTTrainer and DPOTrainer, where what a user
adds is the language of a row.

    class Trainer(bm.LanguageTrainerMixin, SFTTrainer): ...

    trainer = Trainer(model=..., train_dataset=..., moo=bm.BucketMOOConfig(languages=["de", "fr"]))

Read in transformers 5.23 (`trainer.py`) and TRL 1.16 (`sft_trainer.py`, `dpo_trainer.py`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset

from bucketmoo_ds.adapters import mixed
from bucketmoo_ds.adapters.session import Session
from bucketmoo_ds.config import SECTION, BucketMOOConfig
from bucketmoo_ds.data.sampler import LanguageBatchSampler
from bucketmoo_ds.errors import BucketMOOError
from bucketmoo_ds.integrations import trainer_refusals as refusals
from bucketmoo_ds.integrations.fused_head import unfuse
from bucketmoo_ds.integrations.language_batches import packed_apart, packed_together, placed_loader
from bucketmoo_ds.integrations.language_column import NONE, LanguageCollator, LanguageColumn
from bucketmoo_ds.integrations.language_losses import LanguageLog, TokenLosses
from bucketmoo_ds.integrations.termination import TerminationRequest, unsaved
from bucketmoo_ds.integrations.wrapped import register, wrapper_of
from bucketmoo_ds.pipeline import checkpoint

if TYPE_CHECKING:
    from transformers import Trainer as _Behind  # or what is derived from it
else:
    _Behind = object


class LanguageTrainerMixin(_Behind):
    """To be put before a Trainer class. It keeps the language of every row through preparing, packing and collating,
    draws micro-batches (placed), resolves conflicts under whatever wrapper Trainer builds, logs by language, and keeps
    its state in checkpoints.

    Args:
        moo: the settings; without them, or with `enabled=False`, the trainer is exactly the class behind.
        mode: `placed`: each micro-batch is of one language, and `LanguageBatchSampler` draws it. `mixed`: batches are
            the trainer's own. Left out, what `moo.mode` says, and else `placed`.
        language_column: the column of the data that says a row's language: by name, index, ClassLabel or another usual
            spelling; in mode `mixed` also a list with the language of each token, -1 for none.
        aliases: what else the column writes, and which of the languages it means.
        sampler: further arguments of `LanguageBatchSampler`, such as `temperature` or `repeat`.

    Raises:
        ConfigError: there is no such column, a value means no language, or the trainer or its model cannot do it.
    """

    def __init__(
        self,
        *args: Any,
        moo: BucketMOOConfig | None = None,
        mode: str | None = None,
        language_column: str = "language",
        aliases: Mapping[str, str] | None = None,
        sampler: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._moo_config = moo if moo is not None and moo.enabled else None
        self._moo_session: Session | mixed.MixedSession | None = None
        self._moo_placed: LanguageBatchSampler | None = None  # of the loader, where we made it
        self._moo_listener: TokenLosses | None = None
        self._moo_evaluated: LanguageLog | None = None
        self._moo_pending: dict[str, float] = {}  # of the log that comes
        if self._moo_config is not None:
            self._moo_mode = refusals.mode_of(self._moo_config, mode)
            self._moo_column = LanguageColumn(self._moo_config, language_column, aliases)
            self._moo_sampler = dict(sampler or {})
            behind = type(self).__mro__[type(self).__mro__.index(LanguageTrainerMixin) + 1 :]
            refusals.refuse_trainer(behind, self._moo_mode)
        super().__init__(*args, **kwargs)
        if self._moo_config is None:
            return
        trainer: Any = self
        if trainer.train_dataset is not None:
            self._moo_column.check(self._moo_table(trainer.train_dataset))
        if self._moo_mode == "mixed":
            unfuse(trainer.model)
        self._moo_log = LanguageLog(self._moo_config.languages, trainer.args.device)
        self._moo_saves_at_the_end = _taken_over(trainer)
        trainer.add_callback(_callback(self))

    @property
    def moo(self) -> Any:
        """What resolves: the session, or, under DeepSpeed, the engine's; `None` before training. `moo.last` is the
        latest window's resolution."""
        engine = getattr(self, "model_wrapped", None) if self._moo_config is not None else None
        return self._moo_session or getattr(engine, "moo", None)

    # --- data ---------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """Trainer's; placed, its batches are those of `LanguageBatchSampler`."""
        trainer: Any = self
        if self._moo_config is None or trainer.train_dataset is None:
            return super().get_train_dataloader()
        with self._moo_collating(trainer.train_dataset):
            if self._moo_mode == "mixed":
                return super().get_train_dataloader()
            languages = self._moo_column.of_rows(self._moo_table(trainer.train_dataset))
            return placed_loader(trainer, self._moo_config, languages, self._moo_sampler)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Trainer's; batches keep their languages."""
        if self._moo_config is None:
            return super().get_eval_dataloader(eval_dataset)
        trainer: Any = self
        rows = trainer.eval_dataset if eval_dataset is None else eval_dataset
        with self._moo_collating(trainer.eval_dataset[rows] if isinstance(rows, str) else rows):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Trainer's; batches keep their languages."""
        if self._moo_config is None:
            return super().get_test_dataloader(test_dataset)
        with self._moo_collating(test_dataset):
            return super().get_test_dataloader(test_dataset)

    def _moo_table(self, rows: Any) -> Any:
        """The rows as data whose columns can be read."""
        return rows

    @contextlib.contextmanager
    def _moo_collating(self, dataset: Any) -> Iterator[None]:
        """Loaders that are made inside the `with` block keep the languages of this data set's rows."""
        trainer: Any = self
        collator = trainer.data_collator
        dispatched = trainer.accelerator.dispatch_batches
        dispatched = isinstance(dataset, IterableDataset) if dispatched is None else dispatched  # as Accelerate does
        table_of_rows = self._moo_table(dataset)
        trainer.data_collator = LanguageCollator(collator, self._moo_column, table_of_rows, as_tensors=dispatched)
        try:
            yield
        finally:
            trainer.data_collator = collator

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        trainer: Any = self
        if self._moo_config is not None and self._moo_column.name not in trainer._signature_columns:
            trainer._signature_columns = [*trainer._signature_columns, self._moo_column.name]

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *rest: Any) -> Any:
        """TRL's. Packing keeps two columns alone, so here each language is packed by itself; or, mixed, with the
        language of every token beside them."""
        prepare: Callable[..., Any] = super()._prepare_dataset
        packing = bool(rest and rest[0] is True)  # DPOTrainer's has no such argument
        if self._moo_config is None or not packing or self._moo_column.name not in (dataset.column_names or ()):
            return prepare(dataset, processing_class, args, *rest)
        pack = packed_apart if self._moo_mode == "placed" else packed_together
        given = functools.partial(prepare, processing_class=processing_class)
        return pack(dataset, self._moo_column, given, args, rest)

    # --- training -----------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's."""
        if self._moo_config is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        trainer: Any = self
        if resume_from_checkpoint is True:
            from transformers.trainer_utils import get_last_checkpoint

            resume_from_checkpoint = get_last_checkpoint(trainer.args.output_dir) or True
        self._moo_resumes = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str) else None
        refusals.refuse_again(trainer, self._moo_session)
        if self._moo_mode == "placed" and wrapper_of(trainer.model_wrapped) == "ddp":
            trainer.model_wrapped = trainer.model  # an earlier run's, which keeps its communication hook
        if trainer.model_wrapped is trainer.model and not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
            # An evaluation before has marked the model: Accelerate would not wrap it, and each rank train by itself.
            trainer.model._is_accelerate_prepared = False
        self._moo_saved: int | None = None  # the step of the latest checkpoint
        self._moo_ending = False
        with (
            TerminationRequest(self._moo_saves_at_the_end) as self._moo_termination,
            self._moo_section(),
            self._moo_syncing(),
        ):
            try:
                return super().train(resume_from_checkpoint, *args, **kwargs)
            finally:
                self._moo_close()

    @contextlib.contextmanager
    def _moo_section(self) -> Iterator[None]:
        """DeepSpeed engines that are made inside the `with` block read the settings from their JSON."""
        trainer: Any = self
        if not trainer.is_deepspeed_enabled:
            yield
            return
        assert self._moo_config is not None
        settings = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
        before = settings.get(SECTION)
        section = self._moo_config.to_json()
        settings[SECTION] = {**section, "mode": "mixed"} if self._moo_mode == "mixed" else section
        try:
            yield
        finally:
            settings.pop(SECTION, None)
            if before is not None:
                settings[SECTION] = before

    @contextlib.contextmanager
    def _moo_syncing(self) -> Iterator[None]:
        """Inside the `with` block Trainer exchanges each micro-step: by itself the last of a window alone, with
        languages added up."""
        trainer: Any = self
        told = trainer.accelerator.gradient_state.plugin_kwargs  # of the process
        before = dict(told)
        if self._moo_mode == "placed" and not trainer.is_deepspeed_enabled:
            told["sync_each_batch"] = True
        try:
            yield
        finally:
            told.clear()
            told.update(before)

    def _wrap_model(self, model: Any, training: bool = True, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, before it wraps the model: mixed, the model is registered by then."""
        trainer: Any = self
        if self._moo_config is not None and self._moo_mode == "mixed" and training and not trainer.is_deepspeed_enabled:
            self._moo_close()
            scaler = getattr(trainer.accelerator, "scaler", None)
            self._moo_session = mixed.register(
                trainer.model,
                self._moo_config,
                micro_steps=lambda: _divided_by(trainer),
                loss_scale=scaler.get_scale if scaler is not None else lambda: 1.0,
            )
        return super()._wrap_model(model, training, *args, **kwargs)

    def _moo_begin(self) -> None:
        """The model is wrapped, and training begins."""
        trainer: Any = self
        assert self._moo_config is not None
        if self._moo_mode == "placed" and not trainer.is_deepspeed_enabled:
            self._moo_close()
            refusals.refuse_data_parallel(trainer)
            micro_steps, scaler = trainer.args.gradient_accumulation_steps, getattr(trainer.accelerator, "scaler", None)
            self._moo_session = register(trainer.model_wrapped, self._moo_config, micro_steps, scaler)
        if self.moo is None:
            raise BucketMOOError(
                f"Trainer has built {type(trainer.model_wrapped).__name__}, whose gradients nobody resolves: its "
                f"DeepSpeed JSON has lost the section {SECTION}, or another package has replaced the engine"
            )
        if self._moo_placed is not None and self._moo_mode == "placed":
            self._moo_placed.follow(self.moo)
        if self._moo_session is not None and self._moo_resumes is not None:
            states = checkpoint.load(self._moo_resumes, self._moo_config)
            if states is not None:
                self._moo_session.load_state_dict(states["moo"])
        if self._moo_mode == "mixed":
            refusals.refuse_apart(trainer)
            self._moo_listen()
        self._moo_windows = self._moo_resolved
        self._moo_verified = False
        self._moo_log.clear()
        self._moo_pending = {}
        if self._moo_resumes is not None:
            self._moo_saved = trainer.state.global_step
        if trainer.is_world_process_zero():
            self._moo_termination.say_what_is_lost(lambda: unsaved(trainer.state.global_step, self._moo_saved))

    def _moo_close(self) -> None:
        """The run is over, or begins anew. What it has decided can still be asked for."""
        if self._moo_session is not None:
            self._moo_session.close()
        if self._moo_listener is not None:
            self._moo_listener.close()
            self._moo_listener = None

    @property
    def _moo_resolved(self) -> int:
        return int(self.moo.windows)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; it fetches all micro-batches of a window, which a mixed session is told."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if batches and self._moo_config is not None and self._moo_mode == "mixed" and self.moo is not None:
            self.moo.expect(batches)
        return batches, num_items

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; the language goes beside the batch, not through it."""
        step: Callable[..., Any] = super().training_step
        if self._moo_config is None or self._moo_column.key not in inputs:
            return step(model, inputs, *args, **kwargs)
        told, inputs = _taken_off(inputs, self._moo_column.key)
        owner: Any = self._moo_session or self.model_wrapped
        if self._moo_mode == "mixed":
            assert self._moo_listener is not None
            self._moo_listener.expect(inputs, told)
            with owner.language(told):
                loss = step(model, inputs, *args, **kwargs)
            found = self._moo_listener.take()
            if found is not None:
                self._moo_log.add_losses(*found)
            return loss
        # Without labels each row counts as one, such as a pair of preferences.
        tokens = None if "labels" in inputs or "shift_labels" in inputs else len(told)
        language = sorted({*(told if isinstance(told, list) else told.flatten().tolist())} - {NONE})
        with owner.language(language, target_tokens=tokens):
            loss = step(model, inputs, *args, **kwargs)
        slot = owner.slot
        self._moo_log.add_loss(slot.language, loss * slot.scale, slot.target_tokens)
        return loss

    def _moo_stepped(self) -> None:
        """The optimizer has stepped.

        Raises:
            BucketMOOError: on gradients that no window has resolved.
        """
        trainer: Any = self
        if not self._moo_verified and not trainer.accelerator.optimizer_step_was_skipped:
            if self._moo_resolved == self._moo_windows:
                raise BucketMOOError(
                    f"the first optimizer step of {type(self).__name__} has used gradients that no window has "
                    f"resolved: its model is a {type(trainer.model_wrapped).__name__}, and its gradients took another "
                    "way. Let training_step call the model that it is given, and the optimizer step once a window"
                )
            self._moo_verified = True
        if self._moo_resolved > self._moo_windows:
            self._moo_windows = self._moo_resolved
            self._moo_log.add_window(self.moo.last)

    def _moo_give_up(self) -> None:
        """An epoch is over, perhaps within a window that a callback has stopped: it is trained again, and its gradients
        are no part of the next one's."""
        owner: Any = self._moo_session or self.model_wrapped
        if self.moo.in_window and hasattr(owner, "abandon"):
            owner.abandon()

    def _save_checkpoint(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        """Trainer's, and the session's state beside it; DeepSpeed's own checkpoints have it."""
        super()._save_checkpoint(model, trial, *args, **kwargs)
        trainer: Any = self
        session: Any = self._moo_session
        if session is None or self._moo_config is None:
            return
        folder = Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}"
        pipeline = getattr(session, "moo", session)
        checkpoint.save(folder, self._moo_config, pipeline.plan, {"moo": session.state_dict()}, pipeline.exchange)

    def _moo_end_if_asked(self, control: Any) -> None:
        """The optimizer has stepped: if any rank has got a SIGTERM by now, all save this step, and end."""
        trainer: Any = self
        if not self._moo_saves_at_the_end or control.should_training_stop:  # which has ended on all of them
            return
        asked = torch.tensor(float(self._moo_termination.asked), device=trainer.args.device)
        if trainer.accelerator.reduce(asked, "sum").item() > 0:
            self._moo_ending = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # there may be seconds left

    def _moo_has_saved(self) -> None:
        trainer: Any = self
        self._moo_saved = trainer.state.global_step
        if self._moo_ending and trainer.is_world_process_zero():
            self._moo_termination.tell_saved(self._moo_saved, "resume_from_checkpoint=True")

    def _moo_tell(self, should_log: bool) -> None:
        """Trainer is about to log, on all ranks, or not."""
        trainer: Any = self
        if should_log:
            self._moo_pending |= self._moo_log.take(lambda each: trainer.accelerator.reduce(each, "sum"))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's; what is logged of training has the languages beside it."""
        if self._moo_pending and "loss" in logs:
            logs.update(self._moo_pending)
            self._moo_pending = {}
        super().log(logs, *args, **kwargs)

    # --- evaluation ---------------------------------------------------------------------------------------------

    def _moo_listen(self) -> TokenLosses:
        if self._moo_listener is None:
            assert self._moo_config is not None
            trainer: Any = self
            count = len(self._moo_config.languages)
            self._moo_listener = TokenLosses(trainer.model, count, self._moo_config.shift_labels)
        return self._moo_listener

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; the metrics have the mean loss per target token of each language."""
        if self._moo_config is None:
            return super().evaluation_loop(*args, **kwargs)
        trainer: Any = self
        self._moo_evaluated = LanguageLog(self._moo_config.languages, trainer.args.device)
        trains = self._moo_listener is not None
        try:
            self._moo_listen()
            output = super().evaluation_loop(*args, **kwargs)
            prefix = kwargs.get("metric_key_prefix", "eval")
            found = self._moo_evaluated.losses(lambda each: each)  # gathered already
            output.metrics.update({f"{prefix}_{name}_loss": loss for name, loss in found.items()})
        finally:
            self._moo_evaluated = None
            if not trains and self._moo_listener is not None:
                self._moo_listener.close()
                self._moo_listener = None
        return output

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, which does not see the language."""
        step: Callable[..., Any] = super().prediction_step
        if self._moo_config is None or self._moo_column.key not in inputs:
            return step(model, inputs, *args, **kwargs)
        trainer: Any = self
        told, inputs = _taken_off(inputs, self._moo_column.key)
        if self._moo_listener is None or self._moo_evaluated is None:
            return step(model, inputs, *args, **kwargs)
        self._moo_listener.expect(trainer._prepare_inputs(inputs), told)
        result = step(model, inputs, *args, **kwargs)
        found = self._moo_listener.take()
        if found is not None:  # without the rows that fill up the last batch of some rank
            self._moo_evaluated.add_losses(*trainer.accelerator.gather_for_metrics(found))
        return result


def _taken_off(inputs: Any, key: str) -> tuple[Any, Any]:
    """Returns an entry of a batch, and the batch without it; the caller's own stays as it is."""
    rest = copy.copy(inputs)
    told = rest.pop(key)
    return told, rest


def _divided_by(trainer: Any) -> int:
    """By how many micro-steps Trainer divides a loss that is the mean of a micro-batch."""
    return int(getattr(trainer, "current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps))


def _callback(trainer: Any) -> Any:
    from transformers import TrainerCallback

    class Languages(TrainerCallback):
        """Tells the trainer where its run stands."""

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            trainer._moo_begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer._moo_stepped()
            trainer._moo_end_if_asked(control)
            trainer._moo_tell(control.should_log)

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer._moo_give_up()
            if trainer._moo_ending:  # the epoch has not ended
                control.should_save = control.should_evaluate = False
            trainer._moo_tell(control.should_log)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer._moo_has_saved()

    return Languages()


def _taken_over(trainer: Any) -> bool:
    """Returns whether the arguments ask for a checkpoint at SIGTERM, which is ours to write then: Trainer's callback
    (`trainer_jit_checkpoint.py`, 5.23) may save between a window and its optimizer step, calls no `on_save`, and each
    rank saves when its own signal has come, whatever the others do."""
    if not getattr(trainer.args, "enable_jit_checkpoint", False):
        return False
    from transformers.trainer_jit_checkpoint import JITCheckpointCallback

    theirs = trainer.pop_callback(JITCheckpointCallback)
    theirs.on_train_end(trainer.args, trainer.state, trainer.control)  # which gives the signal back
    return True
