"""transformers' Trainer on several languages, the same under every launcher and wrapper (docs/launchers.md).

    torchrun --nproc-per-node 2 examples/train_trainer.py --output_dir out --max_steps 20      # DDP
    ... --deepspeed configs/trainer_zero2.json                                                 # or trainer_zero3.json

All arguments of TrainingArguments are taken. Without `--model` and `--data` a small model is trained on made-up rows.
Run again, it goes on from the last checkpoint in `--output_dir`; `--enable_jit_checkpoint` saves one at SIGTERM.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

import bucketmoo_ds as bm


@dataclass
class Options:
    model: str | None = field(default=None, metadata={"help": "a name or folder of transformers"})
    data: str | None = field(default=None, metadata={"help": "JSON lines with `text` and the language column"})
    language_column: str = "language"
    languages: list[str] = field(default_factory=lambda: ["de", "fr", "ko"])
    aggregator: str = "upgrad"
    length: int = 32


def main() -> None:
    options, arguments = HfArgumentParser((Options, TrainingArguments)).parse_args_into_dataclasses()
    folder = Path(arguments.output_dir)
    if (folder / "model").exists():  # a job that was put back into the queue as it ended
        return
    set_seed(arguments.seed)
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model)
    else:
        sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, attention_dropout=0.1))
    trainer = bm.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows(options),
        moo=bm.BucketMOOConfig(languages=options.languages, aggregator=options.aggregator, granularity="layer"),
        language_column=options.language_column,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.exists() else None)
    if trainer.is_world_process_zero():
        print(f"step {trainer.state.global_step}: {trainer.moo.windows} windows resolved", flush=True)
    if trainer.state.global_step == trainer.state.max_steps:  # and not ended by a signal
        trainer.save_model(folder / "model")


def rows(options: Options) -> Dataset:
    """Token numbers, labels and the language of each row; made up, a language has letters of its own."""
    if options.data:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        texts = load_dataset("json", data_files=options.data, split="train")
        numbers = texts.map(lambda row: {"input_ids": tokenizer(row["text"])["input_ids"][: options.length]})
        full = numbers.filter(lambda row: len(row["input_ids"]) == options.length)
        return full.map(lambda row: {"labels": row["input_ids"]})
    draw = random.Random(0)
    names = [name for name in options.languages for _ in range(64)]
    letters = {name: draw.sample(range(256), 60) for name in options.languages}
    ids = [draw.choices(letters[name], k=options.length) for name in names]
    return Dataset.from_dict({"input_ids": ids, "labels": ids, options.language_column: names})


if __name__ == "__main__":
    main()
