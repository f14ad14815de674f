"""Trainer and SFTTrainer as users write them, with languages mixed in every micro-batch: two lines more, and a column.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from draw import SEED
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

import bucketmoo_ds as bm
from bucketmoo_ds.errors import ConfigError

LANGUAGES = ["de", "fr", "en"]
WORDS = [f"w{number}" for number in range(40)]


class MixedSFTTrainer(bm.LanguageTrainerMixin, SFTTrainer):
    """What a user writes; the settings say the mode."""


class MixedTrainer(bm.LanguageTrainerMixin, Trainer):
    """And without TRL."""


def config(**settings: Any) -> bm.BucketMOOConfig:
    return bm.BucketMOOConfig(languages=LANGUAGES, granularity="layer", mode="mixed", gram_every=1, **settings)


def model_of(number: int) -> LlamaForCausalLM:
    torch.manual_seed(number)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=43, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, pad_token_id=1, eos_token_id=2, bos_token_id=2,
        )
    )  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: number for number, word in enumerate(["<unk>", "<pad>", "<eos>", *WORDS])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def rows(draw: random.Random) -> list[dict[str, str]]:
    return [
        {"text": " ".join(draw.choices(WORDS, k=draw.randint(4, 20))), "language": draw.choice(LANGUAGES)}
        for _ in range(64)
    ]


def arguments(folder: Path, **settings: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "optim": "sgd",  # what is compared is the sum of gradients
        "learning_rate": 0.5,
        **settings,
    }


def sft(folder: Path, number: int, cls: type = MixedSFTTrainer, packing: bool = True, **settings: Any) -> Any:
    trainer_settings = {name: settings.pop(name) for name in list(settings) if name == "moo"}
    args = SFTConfig(
        **arguments(folder, **settings), packing=packing, max_length=32, gradient_checkpointing=False
    )
    data = Dataset.from_list(rows(random.Random(number)))
    return cls(
        model=model_of(number), args=args, train_dataset=data, processing_class=tokenizer(), **trainer_settings
    )


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in trainer.model.named_parameters()}


@pytest.mark.parametrize("packing", [True, False])
def test_the_mean_by_token_is_plain_training(tmp_path: Path, packing: bool) -> None:
    number = SEED
    plain = sft(tmp_path, number, SFTTrainer, packing)
    plain.train()
    mixed = sft(tmp_path, number, packing=packing, moo=config(aggregator="mean", weighting="token"))
    mixed.train()
    assert mixed.moo.last.window == 3
    assert sum(mixed.moo.last.target_tokens) > 0
    start, reached = dict(model_of(number).named_parameters()), weights_of(plain)
    for name, each in weights_of(mixed).items():
        moved = (reached[name] - start[name]).norm()
        # TRL's fused head and the plain one add up in another order; and four times the parameter itself is rounded to
        # float32, which counts where it has hardly moved.
        assert (each - reached[name]).norm() <= 2e-5 * moved + 4 * 2**-24 * reached[name].norm(), name


def test_off_is_plain_to_the_bit(tmp_path: Path) -> None:
    number = SEED
    plain, off = sft(tmp_path, number, SFTTrainer), sft(tmp_path, number)
    plain.train()
    off.train()
    reached = weights_of(plain)
    assert off.moo is None
    assert all(torch.equal(each, reached[name]) for name, each in weights_of(off).items())


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    number = SEED
    settings = {"moo": config(aggregator="cagrad"), "save_strategy": "steps", "save_steps": 2}
    whole = sft(tmp_path, number, **settings)
    whole.train()
    resumed = sft(tmp_path, number, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    reached = weights_of(whole)
    assert all(torch.equal(each, reached[name]) for name, each in weights_of(resumed).items())
    assert torch.equal(resumed.moo.last.weights, whole.moo.last.weights)


def test_class_labels_go_by_name(tmp_path: Path) -> None:
    """Also where their order is another one, by row and by token."""
    number = SEED
    draw = random.Random(number)
    names = ["en", "de", "fr"]
    features = {"input_ids": Sequence(Value("int64")), "labels": Sequence(Value("int64"))}
    told = [draw.randrange(3) for _ in range(32)]
    ids = [[draw.randrange(3, 43) for _ in range(9)] for _ in told]
    reached = []
    for by_token in (False, True):
        column = Sequence(ClassLabel(names=names)) if by_token else ClassLabel(names=names)
        data = Dataset.from_dict(
            {"input_ids": ids, "labels": ids, "language": [[each] * 9 if by_token else each for each in told]},
            features=Features({**features, "language": column}),
        )
        trainer = MixedTrainer(
            model=model_of(number),
            args=TrainingArguments(**arguments(tmp_path)),
            train_dataset=data,
            data_collator=DataCollatorForLanguageModeling(tokenizer(), mlm=False),
            moo=config(aggregator="upgrad"),
        )
        batch = next(iter(trainer.get_train_dataloader()))
        looked_up = {tuple(row): LANGUAGES.index(names[each]) for row, each in zip(ids, told, strict=True)}
        for row, language in zip(batch["input_ids"].tolist(), list(batch["language"]), strict=True):
            wanted = looked_up[tuple(row)]
            assert (language.tolist() if by_token else language) == ([wanted] * 9 if by_token else wanted)
        trainer.train()
        reached.append(weights_of(trainer))
    for name, each in reached[0].items():
        assert torch.equal(each, reached[1][name]), name


def test_packing_keeps_languages_by_name(tmp_path: Path) -> None:
    """Tokens that a ClassLabel of another order numbers: packed, the numbers are those of `languages`, once."""
    draw = random.Random(SEED)
    names = ["en", "de", "fr"]
    told = [draw.randrange(3) for _ in range(32)]
    ids = [[3 + each] * draw.randint(2, 9) for each in told]  # a token tells its language
    features = Features(
        {
            "input_ids": Sequence(Value("int64")),
            "labels": Sequence(Value("int64")),
            "language": Sequence(ClassLabel(names=names)),
        }
    )
    columns = {"input_ids": ids, "labels": ids, "language": [[each - 3 for each in row] for row in ids]}
    trainer = MixedSFTTrainer(
        model=model_of(SEED),
        args=SFTConfig(**arguments(tmp_path), packing=True, max_length=16, gradient_checkpointing=False),
        train_dataset=Dataset.from_dict(columns, features=features),
        processing_class=tokenizer(),
        moo=config(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    expected = [LANGUAGES.index(names[token - 3]) for token in batch["input_ids"].flatten().tolist()]
    assert batch["language"].flatten().tolist() == expected


def test_evaluation_needs_no_languages(tmp_path: Path) -> None:
    trainer = sft(tmp_path, SEED, packing=False, moo=config())
    without = Dataset.from_dict({"input_ids": [[3, 4, 5]] * 4, "labels": [[3, 4, 5]] * 4})
    assert trainer.evaluate(without)["eval_loss"] > 0


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    data = Dataset.from_dict({"input_ids": [[3, 4]], "labels": [[3, 4]], "lang": ["de"]})
    with pytest.raises(ConfigError, match='no column "language"'):
        MixedTrainer(
            model=model_of(0), args=TrainingArguments(**arguments(tmp_path)), train_dataset=data, moo=config()
        )


def test_the_collator_lays_languages_where_tokens_are() -> None:
    """Padded on the left, and laid one after the other."""
    from transformers import DataCollatorWithFlattening

    from bucketmoo_ds.integrations.language_column import LanguageCollator, LanguageColumn

    column = LanguageColumn(config(), "language")
    left = copy.deepcopy(tokenizer())
    left.padding_side = "left"
    features = [
        {"input_ids": [3, 4, 5], "language": ["de", "de", "fr"]},
        {"input_ids": [6], "language": [2]},
    ]
    padded = LanguageCollator(DataCollatorForLanguageModeling(left, mlm=False), column, None)(features)
    assert padded["language"].tolist() == [[0, 0, 1], [-1, -1, 2]]
    rows_ = [{"input_ids": [3, 4, 5], "language": "fr"}, {"input_ids": [6], "language": "de"}]
    flat = LanguageCollator(DataCollatorWithFlattening(), column, None)(rows_)
    assert flat["language"].tolist() == [[1, 1, 1, 0]]
