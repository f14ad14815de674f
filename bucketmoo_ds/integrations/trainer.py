"""`bm.Trainer`: transformers' Trainer with `LanguageTrainerMixin`, ready-made."""

from __future__ import annotations

import transformers

from bucketmoo_ds.integrations.language_trainer import LanguageTrainerMixin


class Trainer(LanguageTrainerMixin, transformers.Trainer):
    """`transformers.Trainer` and the arguments of `LanguageTrainerMixin`."""
