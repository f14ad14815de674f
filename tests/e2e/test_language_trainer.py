"""`LanguageTrainerMixin` as users write it, one language a micro-batch: class, settings and a column."""

from __future__ import annotations

import math
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from draw import SEED
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import bucketmoo_ds as bm
from bucketmoo_ds.errors import BucketMOOError, ConfigError, LanguageError
from bucketmoo_ds.integrations import termination
from bucketmoo_ds.integrations.language_column import LanguageCollator, LanguageColumn

LANGUAGES = ["de", "fr", "en"]
MICRO_STEPS, BATCH, LENGTH, VOCABULARY = 3, 2, 7, 43


class Mine(bm.LanguageTrainerMixin, Trainer):
    """What a user writes."""


def config(**settings: Any) -> bm.BucketMOOConfig:
    return bm.BucketMOOConfig(**{"languages": LANGUAGES, "aggregator": "upgrad", "granularity": "layer", **settings})


def model_of(number: int) -> LlamaForCausalLM:
    torch.manual_seed(number)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            pad_token_id=1, eos_token_id=2, bos_token_id=2,
        )
    )  # fmt: skip


def data(column: str = "language", kind: str = "names", rows: int = 48) -> Dataset:
    """Rows of one length with different numbers of targets; the same ones, however the language is written."""
    draw = random.Random(SEED)
    told = [LANGUAGES[row % 3] for row in range(rows)]
    ids = [[draw.randrange(3, VOCABULARY) for _ in range(LENGTH)] for _ in told]
    labels = [[-100] * (hidden := draw.randrange(4)) + row[hidden:] for row in ids]
    order = ["fr", "en", "de"]
    written = {
        "names": told,
        "ints": [LANGUAGES.index(each) for each in told],
        "classes": [order.index(each) for each in told],
        "aliases": [{"de": "deu_Latn", "fr": "French", "en": "british"}[each] for each in told],
    }[kind]
    plain = {"names": Value("string"), "aliases": Value("string"), "ints": Value("int64")}
    ints = Sequence(Value("int64"))
    features = Features({
        "input_ids": ints, "labels": ints, column: plain.get(kind) or ClassLabel(names=order)
    })  # fmt: skip
    return Dataset.from_dict({"input_ids": ids, "labels": labels, column: written}, features=features)


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    usual = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": BATCH, "seed": SEED,
        "gradient_accumulation_steps": MICRO_STEPS, "report_to": [], "use_cpu": True, "save_strategy": "no",
        "logging_strategy": "no", "learning_rate": 0.05, "disable_tqdm": True,
    }  # fmt: skip
    return TrainingArguments(**{**usual, **settings})


def trainer_of(folder: Path, cls: type = Mine, rows: Any = None, number: int = SEED, **settings: Any) -> Any:
    names = ("moo", "mode", "language_column", "aliases", "eval_dataset")
    more = {name: settings.pop(name) for name in names if name in settings}
    dataset = data() if rows is None else rows
    return cls(model=model_of(number), args=arguments(folder, **settings), train_dataset=dataset, **more)


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in trainer.model.named_parameters()}


def assert_same(found: Any, wanted: Any) -> None:
    reached = weights_of(wanted)
    assert all(torch.equal(each, reached[name]) for name, each in weights_of(found).items())


def token_losses(model: Any, row: dict[str, Any]) -> list[float]:
    labels = torch.tensor(row["labels"])[1:]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(row["input_ids"])[None]).logits[0, :-1]
    return cross_entropy(logits, labels, reduction="none")[labels != -100].tolist()


def test_the_loop_by_hand_does_the_same(tmp_path: Path) -> None:
    """Trainer divides a sum by the window's tokens, the loop means by the micro-steps: alike but for roundings."""
    trainer = trainer_of(tmp_path, moo=config(), optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0)
    trainer.train()
    rows, model = data(), model_of(SEED)
    session = bm.single.register(model, config(), micro_steps=MICRO_STEPS)
    sampler = bm.LanguageBatchSampler(rows, config(), micro_batch_size=BATCH, micro_steps=MICRO_STEPS, seed=SEED)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = iter(DataLoader(rows.with_format("torch"), batch_sampler=sampler, collate_fn=list))
    for _ in range(4):
        for _ in range(MICRO_STEPS):
            batch = next(loader)
            ids, labels = (torch.stack([row[name] for row in batch]) for name in ("input_ids", "labels"))
            loss = model(input_ids=ids, labels=labels, language=[row["language"] for row in batch]).loss
            (loss / MICRO_STEPS).backward()
        optimizer.step()
        optimizer.zero_grad()
    start, reached = dict(model_of(SEED).named_parameters()), dict(model.named_parameters())
    for name, each in weights_of(trainer).items():
        moved = (reached[name] - start[name]).norm()
        # The rule's weights answer to roundings a little, and four times the parameter is rounded to float32.
        assert (each - reached[name]).norm() <= 1e-4 * moved + 4 * 2**-24 * reached[name].norm(), name
    assert trainer.moo.last.target_tokens == session.last.target_tokens


@pytest.mark.parametrize("settings", [{}, {"moo": bm.BucketMOOConfig(languages=LANGUAGES, enabled=False)}])
def test_off_is_plain_to_the_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    plain, off = trainer_of(tmp_path, Trainer), trainer_of(tmp_path, bm.Trainer, **settings)
    plain.train()
    off.train()
    assert off.moo is None
    assert_same(off, plain)


@pytest.mark.parametrize("mode", ["placed", "mixed"])
def test_a_run_resumed_in_its_second_epoch_is_the_same_run(tmp_path: Path, mode: str) -> None:
    """Six or eight windows an epoch; also with workers, which draw ahead, of shares that move."""
    schedule = {"adapt": "doge", "rate": 1.0} if mode == "placed" else {}
    moo = config(aggregator="pcgrad", schedule=schedule)
    settings = {"moo": moo, "mode": mode, "max_steps": 12, "dataloader_num_workers": 1}
    if mode == "placed":
        settings["gradient_accumulation_steps"] = 4  # else each language has the one place that it has anyway
    whole = trainer_of(tmp_path, save_strategy="steps", save_steps=10, **settings)
    whole.train()
    resumed = trainer_of(tmp_path, number=SEED + 1, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert_same(resumed, whole)
    assert resumed.moo.last.window == whole.moo.last.window == 11


def test_sigterm_without_a_checkpoint_says_what_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                signal.raise_signal(signal.SIGTERM)

    said: list[str] = []
    monkeypatch.setattr(termination, "_end", said.append)  # which ends the process
    trainer = trainer_of(tmp_path, moo=config(), save_strategy="steps", save_steps=2)
    trainer.add_callback(Ended())
    trainer.train()
    assert set(said) == {"1 finished steps are lost: the latest is of step 2"}
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("mode", ["placed", "mixed"])
def test_trains_twice(tmp_path: Path, mode: str) -> None:
    """The second run is a run of its own, on the weights of the first."""
    trainer = trainer_of(tmp_path, moo=config(), mode=mode)
    trainer.train()
    other = trainer_of(tmp_path, moo=config(), mode=mode)
    other.model.load_state_dict(trainer.model.state_dict())
    trainer.optimizer = None  # Trainer would go on with the one that it has
    trainer.train()
    other.train()
    assert trainer.moo.last.window == 3
    assert_same(trainer, other)


@pytest.mark.parametrize("mode", ["placed", "mixed"])
def test_an_epoch_that_is_stopped_within_a_window(tmp_path: Path, mode: str) -> None:
    """What came of the window is given up, so that it can be saved, and the next epoch's first one is whole."""

    class Stops(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2 and trainer.moo.last.window == 1 and not stopped:
                stopped.append(trainer.current_gradient_accumulation_steps)
                control.should_epoch_stop = True

    stopped: list[int] = []
    settings = {"moo": config(), "mode": mode, "max_steps": 9}  # one into the second epoch
    trainer = trainer_of(tmp_path, save_strategy="epoch", **settings)
    trainer.add_callback(Stops())
    trainer.train()
    assert stopped
    resumed = trainer_of(tmp_path, number=SEED + 1, ignore_data_skip=True, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.moo.last.window == resumed.moo.last.window == 8
    assert (tmp_path / "checkpoint-2" / "bucket_moo.json").exists()


@pytest.mark.parametrize("kind", ["ints", "classes", "aliases"])
def test_a_language_is_one_however_it_is_written(tmp_path: Path, kind: str) -> None:
    names = trainer_of(tmp_path, moo=config())
    written = trainer_of(
        tmp_path, rows=data("channel", kind), moo=config(), language_column="channel", aliases={"british": "en"}
    )
    names.train()
    written.train()
    assert_same(written, names)


def test_what_may_mean_two_languages_is_refused() -> None:
    column = LanguageColumn(bm.BucketMOOConfig(languages=["zho_Hans", "zho_Hant", "sr_Latn"]), "language")
    assert column.index("zh-Hant") == 1
    assert column.index("srp") == 2
    with pytest.raises(LanguageError, match="may mean zho_Hans or zho_Hant"):
        column.index("Chinese")
    for unknown in ("sr_Cyrl", "klingon"):
        with pytest.raises(LanguageError, match=f'"{unknown}" is not in .*zho_Hans, zho_Hant'):
            column.index(unknown)
    with pytest.raises(ConfigError, match="aliases"):
        LanguageColumn(config(), "language", {"x": "it"})


@pytest.mark.parametrize("mode", ["placed", "mixed"])
def test_logs_are_of_each_language(tmp_path: Path, mode: str) -> None:
    """With a learning rate of 0 and one epoch: each row once, so the losses are those of the whole data."""
    trainer = trainer_of(
        tmp_path, moo=config(aggregator="mean"), mode=mode, learning_rate=0.0, max_steps=8, logging_strategy="steps",
        logging_steps=8, eval_strategy="steps", eval_steps=8, eval_dataset=data("language", "classes"),
        per_device_eval_batch_size=5,
    )  # fmt: skip
    trainer.train()
    logs = next(each for each in trainer.state.log_history if "loss" in each)
    evaluated = next(each for each in trainer.state.log_history if "eval_loss" in each)
    for name in LANGUAGES:
        losses = [loss for row in data() if row["language"] == name for loss in token_losses(trainer.model, row)]
        assert logs[f"tokens/{name}"] == len(losses)
        # Sums of some hundred losses in float32.
        assert logs[f"loss/{name}"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert evaluated[f"eval_{name}_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert logs[f"moo/weight/{name}"] > 0
    assert 0 <= logs["moo/conflict"] <= 1
    # Mixed, batches are Trainer's own: six rows in random order, now and then of one language.
    assert 0 <= logs["moo/single_language_windows"] <= (0 if mode == "placed" else 0.5)
    assert trainer.evaluate()["eval_de_loss"] == pytest.approx(evaluated["eval_de_loss"], rel=1e-6)


def test_seq2seq_trainer(tmp_path: Path) -> None:
    """An encoder-decoder's labels all count."""

    class Sequences(bm.LanguageTrainerMixin, Seq2SeqTrainer):
        pass

    torch.manual_seed(SEED)
    sizes = {f"{side}_{name}": 1 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    ffn = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    model = BartForConditionalGeneration(BartConfig(vocab_size=VOCABULARY, d_model=16, **sizes, **ffn))
    model.accepts_loss_kwargs = False  # it returns the mean
    args = arguments(tmp_path, logging_strategy="steps", logging_steps=4)
    trainer = Sequences(
        model=model, args=Seq2SeqTrainingArguments(**{**args.to_dict(), "predict_with_generate": False}),
        train_dataset=data(), eval_dataset=data(), moo=config(),
    )  # fmt: skip
    trainer.train()
    logs = next(each for each in trainer.state.log_history if "loss" in each)
    assert sum(logs[f"tokens/{name}"] for name in LANGUAGES) == sum(
        sum(label != -100 for label in row["labels"]) for row in data().select(_drawn(trainer))
    )
    assert math.isfinite(trainer.evaluate()["eval_fr_loss"])


def _drawn(trainer: Any) -> list[int]:
    sampler = bm.LanguageBatchSampler(data(), config(), micro_batch_size=BATCH, micro_steps=MICRO_STEPS, seed=SEED)
    batches = iter(sampler)
    return [row for _ in range(4 * MICRO_STEPS) for row in next(batches)]


def test_a_window_that_is_not_resolved_stops(tmp_path: Path) -> None:
    """A step that trains a copy, whose gradients are then handed over."""

    class Elsewhere(Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any) -> torch.Tensor:
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            return torch.zeros(())

    class Mixed(bm.LanguageTrainerMixin, Elsewhere):
        pass

    for mode in ("placed", "mixed"):
        with pytest.raises(BucketMOOError, match="no window has resolved"):
            trainer_of(tmp_path, Mixed, moo=config(), mode=mode).train()


def test_refusals_name_the_way_out(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    for cls, mode, way_out in (
        (trl.RewardTrainer, "placed", "Seq2SeqTrainer, SFTTrainer, DPOTrainer"),
        (trl.DPOTrainer, "mixed", 'mode="placed"'),
    ):
        with pytest.raises(ConfigError, match=way_out):
            type("T", (bm.LanguageTrainerMixin, cls), {})(model=None, moo=config(), mode=mode)
    with pytest.raises(ConfigError, match='no column "lang"'):
        trainer_of(tmp_path, moo=config(), language_column="lang")
    with pytest.raises(ConfigError, match="placed"):
        trainer_of(tmp_path, moo=config(mode="mixed"), mode="placed")
    with pytest.raises(ConfigError, match=r'train_sampling_strategy = "group_by_length".*mode="mixed"'):
        trainer_of(tmp_path, moo=config(), train_sampling_strategy="group_by_length").train()

    class WithLoader(Trainer):
        def get_train_dataloader(self) -> Any:
            return super().get_train_dataloader()

    with pytest.raises(ConfigError, match=r'WithLoader.get_train_dataloader.*mode="mixed"'):
        trainer_of(tmp_path, type("T", (bm.LanguageTrainerMixin, WithLoader), {}), moo=config())


def test_numpys_numbers_are_those_of_the_classlabel() -> None:
    """Also where tokens have them: their order is another than that of the languages."""
    rows = data(kind="classes").with_format("numpy")
    column = LanguageColumn(config(), "language")
    collate = LanguageCollator(lambda features: {"input_ids": torch.zeros(len(features), 3)}, column, rows)
    number, name = int(rows[0]["language"]), data()[0]["language"]
    assert rows.features["language"].int2str(number) == name
    by_row = collate([{"input_ids": [0, 0, 0], "language": rows[0]["language"]}])
    by_token = collate([{"input_ids": [0, 0, 0], "language": np.array([number, -1, number])}])
    wanted = LANGUAGES.index(name)
    assert number != wanted
    assert by_row["language"] == [wanted]
    assert by_token["language"].tolist() == [[wanted, -1, wanted]]


def test_logs_come_with_every_strategy(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, moo=config(), max_steps=16, logging_strategy="epoch")
    trainer.train()
    logs = [each for each in trainer.state.log_history if "loss" in each]
    assert len(logs) == 2
    wanted = {name: logs[0][f"tokens/{name}"] for name in LANGUAGES}
    assert all(logs[1][f"tokens/{name}"] == each > 0 for name, each in wanted.items())


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["<unk>", "<pad>", "<eos>", *map(str, range(40))])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer(tmp_path: Path, packing: bool) -> None:
    """Packed, the rows of a micro-batch are of one language still, as a token tells."""
    trl = pytest.importorskip("trl")

    class Tuned(bm.LanguageTrainerMixin, trl.SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            told = {(int(each) - 3) // 13 for each in inputs["input_ids"].flatten() if each > 2}
            assert told == set(torch.as_tensor(inputs["language"]).flatten().tolist())
            return super().training_step(model, inputs, *args, **kwargs)

    draw = random.Random(SEED)
    texts = [" ".join(str(13 * (row % 3) + draw.randrange(13)) for _ in range(draw.randint(3, 9))) for row in range(96)]
    args = trl.SFTConfig(
        **{**arguments(tmp_path, logging_strategy="steps", logging_steps=2, max_steps=2).to_dict(), "bf16": False,
           "packing": packing, "max_length": 16, "gradient_checkpointing": False, "hub_token": None}
    )  # fmt: skip
    rows = Dataset.from_dict({"text": texts, "language": [LANGUAGES[row % 3] for row in range(96)]})
    trainer = Tuned(
        model=model_of(SEED), args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer(),
        moo=config(),
    )  # fmt: skip
    trainer.train()
    logs = next(each for each in trainer.state.log_history if "loss" in each)
    assert trainer.moo.last.window == 1
    assert all(logs[f"loss/{name}"] > 0 for name in LANGUAGES)
    assert all(trainer.evaluate()[f"eval_{name}_loss"] > 0 for name in LANGUAGES)


def test_dpo_trainer_averages_pairs(tmp_path: Path) -> None:
    """The mean by token, here by pair, is plain DPOTrainer over the same micro-batches."""
    trl = pytest.importorskip("trl")
    from bucketmoo_ds.integrations.language_batches import placed_loader

    class Preferring(bm.LanguageTrainerMixin, trl.DPOTrainer):
        pass

    class Plain(trl.DPOTrainer):
        def get_train_dataloader(self) -> Any:
            return placed_loader(self, config(), LanguageColumn(config(), "language").of_rows(rows), {})

    draw = random.Random(SEED)
    pair = [" ".join(str(draw.randrange(40)) for _ in range(4)) for _ in range(3 * 48)]
    texts = {"prompt": pair[:48], "chosen": pair[48:96], "rejected": pair[96:]}
    rows = Dataset.from_dict({**texts, "language": [LANGUAGES[row % 3] for row in range(48)]})
    usual = arguments(tmp_path, optim="sgd", learning_rate=0.5, max_steps=2).to_dict()
    usual |= {"hub_token": None, "hub_model_id": "x"}
    args = trl.DPOConfig(**{**usual, "bf16": False, "gradient_checkpointing": False})
    reached = []
    usual_models = {"ref_model": model_of(SEED + 1), "processing_class": tokenizer()}
    for cls, more in ((Plain, {}), (Preferring, {"moo": config(aggregator="mean", weighting="token")})):
        trainer = cls(model=model_of(SEED), args=args, train_dataset=rows, **usual_models, **more)
        trainer.train()
        reached.append(weights_of(trainer))
    start = dict(model_of(SEED).named_parameters())
    for name, each in reached[1].items():
        moved = (reached[0][name] - start[name]).norm()
        # Gradients are added up in another order, and twice the parameter is rounded to float32.
        assert (each - reached[0][name]).norm() <= 1e-4 * moved + 2 * 2**-24 * reached[0][name].norm(), name
