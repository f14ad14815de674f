"""ms-swift's trainer of causal language models. A file that `--external_plugins` names says:

    from bucketmoo_ds.integrations import swift

    swift.use({"languages": ["de", "fr"]})

The language of a row is its column `channel`, which ms-swift keeps up to the collator.

Read in ms-swift 4.6 (`trainers/trainer_factory.py`, `trainers/mixin.py`, `trainers/seq2seq_trainer.py`,
`dataset/utils.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swift.dataset import LazyLLMDataset, PackingDataset
from swift.trainers import Seq2SeqTrainer, TrainerFactory

from bucketmoo_ds.errors import ConfigError
from bucketmoo_ds.integrations.language_trainer import LanguageTrainerMixin
from bucketmoo_ds.integrations.tool_settings import ToolSettings

_chosen: list[ToolSettings] = []


def use(section: Mapping[str, Any]) -> None:
    """From here on `swift sft` and `swift pt` build the trainer of this module.

    Args:
        section: settings of `BucketMOOConfig` and, beside them, `aliases` and `sampler`.

    Raises:
        ConfigError: see `BucketMOOConfig`.
    """
    _chosen[:] = [ToolSettings({**section, "language_column": "channel"})]
    TrainerFactory.TRAINER_MAPPING["causal_lm"] = f"{__name__}.{Trainer.__name__}"


class Trainer(LanguageTrainerMixin, Seq2SeqTrainer):
    """ms-swift's, with what `use` was told."""

    # Its compute_loss divides the sum over the target tokens by num_items_in_batch, and multiplies it by the ranks.
    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        (settings,) = _chosen
        template, training = kwargs["template"], kwargs["args"]
        if settings.config.enabled:
            _refuse(template, training, kwargs.get("train_dataset"))
        if settings.config.mode == "mixed":
            training.use_logits_to_keep = False  # logits would be of fewer tokens than the batch says languages of
        super().__init__(*args, **settings.trainer_arguments, **kwargs)

    def _moo_table(self, rows: Any) -> Any:
        """Rows are tokenized when they are asked for; their columns are there before."""
        return rows.dataset if isinstance(rows, LazyLLMDataset) else rows


def _refuse(template: Any, training: Any, rows: Any) -> None:
    if isinstance(rows, PackingDataset):
        raise ConfigError("packing: a pack would mix languages; leave it out")
    if rows is not None and not hasattr(rows, "__len__"):
        raise ConfigError("streaming: the rows of each language have to be counted; leave it out")
    if template.sequence_parallel_size > 1:
        raise ConfigError("sequence_parallel_size: each rank has to see whole sequences; expected 1")
    told = {"enable_dft_loss": "its loss is weighted by token", "group_by_length": "rows are drawn at random"}
    for name, why in told.items():
        if getattr(training, name, False):
            raise ConfigError(f"{name}: {why}; leave it out")
